"""The bundled device profiles are sound, and a wrong profile is refused by its key."""

from pathlib import Path
from typing import Any

import pytest

from edgekit.devices.profile import (
    PROFILES_FOLDER,
    bundled_profiles,
    find_profile,
    load_profile,
    parse_profile,
)
from edgekit.errors import EdgekitError

IDS = [
    "galaxy-s24",
    "galaxy-s25",
    "jetson-orin-nano-8gb",
    "pixel-9",
    "raspberry-pi-4",
    "raspberry-pi-5",
    "ryzen-ai-9-hx-370",
    "snapdragon-x-elite",
]


def raw_profile(**changes: object) -> dict[str, Any]:
    good = {
        "id": "board",
        "name": "A Board",
        "isa": ["neon", "dotprod"],
        "peak_gb_per_s": 10,
        "ram_gb": [4, 8],
        "source": "its data sheet",
        "clusters": [{"core": "Cortex-A76", "count": 4, "max_ghz": 2.4}],
    }
    return {key: value for key, value in (good | changes).items() if value is not None}


def test_every_bundled_profile_loads() -> None:
    assert [profile.id for profile in bundled_profiles()] == IDS
    assert len(list(PROFILES_FOLDER.iterdir())) == len(IDS)


def test_names_and_aliases_are_unique() -> None:
    words = [word for p in bundled_profiles() for word in (p.id, *p.aliases)]
    assert len(words) == len(set(words))


def test_raspberry_pi_5_as_published() -> None:
    profile = find_profile("Pi5")
    assert profile.id == "raspberry-pi-5"
    assert (profile.peak_gb_per_s, profile.sustained_gb_per_s) == (17.1, 11.4)
    assert profile.bandwidth == (11.4, "sustained")
    assert profile.isa == ("neon", "dotprod")
    assert profile.cpu == "4x Cortex-A76 2.4 GHz"


def test_unknown_bandwidth_stays_unknown() -> None:
    assert find_profile("pixel-9").bandwidth is None


def test_unknown_device_names_the_nearest() -> None:
    with pytest.raises(EdgekitError, match=r"'galaxy-s26'.*did you mean galaxy-s25"):
        find_profile("galaxy-s26")
    with pytest.raises(EdgekitError, match=r"'toaster'.*known: local, galaxy-s24"):
        find_profile("toaster")


def test_minimal_profile() -> None:
    profile = parse_profile(raw_profile())
    assert profile.clusters[0].count == 4
    assert profile.aliases == ()
    assert profile.bandwidth == (10, "peak")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": "red", "speed": 1}, r"unknown key colour, speed; allowed: id, name"),
        ({"name": None, "source": None}, r"missing key name, source"),
        ({"id": 7}, r"id is 7"),
        ({"id": "local"}, r"id is 'local'; it must be another word"),
        ({"name": ""}, r"name is ''"),
        ({"isa": "neon"}, r"isa is 'neon'; it must be a list"),
        ({"isa": ["asimddp"]}, r"isa is 'asimddp'; it must be of .*dotprod"),
        ({"peak_gb_per_s": 0}, r"peak_gb_per_s is 0"),
        ({"peak_gb_per_s": True}, r"peak_gb_per_s is True"),
        ({"sustained_gb_per_s": 11.5}, r"sustained_gb_per_s is 11.5; .*peak of 10"),
        ({"ram_gb": [8, 4]}, r"ram_gb is \[8, 4\]; it must be smallest first"),
        ({"ram_gb": ["4"]}, r"ram_gb is '4'"),
        ({"page_size": 4096}, r"page_size is 4096"),
        ({"clusters": []}, r"clusters is \(\)"),
        ({"clusters": ["A76"]}, r"clusters holds 'A76'"),
        ({"clusters": [{"core": "A76"}]}, r"missing key clusters.count"),
        ({"clusters": [{"core": "A76", "count": 4, "ghz": 2}]}, r"unknown key clusters.ghz"),
        ({"clusters": [{"core": "A76", "count": 2.5}]}, r"count is 2.5"),
        ({"clusters": [{"core": "A76", "count": 4, "max_ghz": -1}]}, r"max_ghz is -1"),
        ({"aliases": ["local"]}, r"aliases is 'local'"),
        ({"peak_gb_per_s": float("nan")}, r"peak_gb_per_s is nan"),
    ],
)
def test_wrong_profile_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(EdgekitError, match=message):
        parse_profile(raw_profile(**changes))


def test_file_errors_name_the_file(tmp_path: Path) -> None:
    file = tmp_path / "board.toml"
    with pytest.raises(EdgekitError, match=r"board\.toml: No such file"):
        load_profile(file)
    file.write_text("id = ")
    with pytest.raises(EdgekitError, match=r"board\.toml: not a TOML file"):
        load_profile(file)
    file.write_bytes(b'id = "\xff"')
    with pytest.raises(EdgekitError, match=r"board\.toml: not a TOML file"):
        load_profile(file)
    file.write_text('id = "other"')
    with pytest.raises(EdgekitError, match=r"board\.toml: missing key name, clusters"):
        load_profile(file)


def test_file_is_named_after_its_id(tmp_path: Path) -> None:
    file = tmp_path / "else.toml"
    file.write_text((PROFILES_FOLDER / "pixel-9.toml").read_text(encoding="utf-8"))
    with pytest.raises(EdgekitError, match=r"else\.toml: id is 'pixel-9'"):
        load_profile(file)


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    source = PROFILES_FOLDER / "raspberry-pi-5.toml"
    file = tmp_path / source.name
    file.write_bytes(b"\xef\xbb\xbf" + source.read_bytes().replace(b"\n", b"\r\n"))
    assert load_profile(file) == load_profile(source)
