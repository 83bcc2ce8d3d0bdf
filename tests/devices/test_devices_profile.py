"""The bundled device profiles are sound, and a wrong profile is refused by its key."""

import re
from itertools import combinations
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
        "sources": dict.fromkeys(("clusters", "isa", "peak_gb_per_s", "ram_gb"), "its data sheet"),
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
    assert (profile.peak_gb_per_s, profile.sustained_gb_per_s) == (17.1, 12.6)
    assert profile.bandwidth == (12.6, "sustained")
    assert profile.isa == ("neon", "fp16", "dotprod")
    assert profile.cpu == "4x Cortex-A76 2.4 GHz"


def test_unknown_bandwidth_stays_unknown_and_says_why() -> None:
    profile = find_profile("pixel-9")
    assert profile.bandwidth is None
    assert "publishes neither" in (profile.no_bandwidth or "")


def test_equal_cores_have_equal_features_but_for_what_a_vendor_withholds() -> None:
    """Of devices that share a core: in all of them the sets of cores are of one generation."""
    for one, other in combinations(bundled_profiles(), 2):
        shared = {c.core for c in one.clusters} & {c.core for c in other.clusters}
        if shared:
            of_one, of_other = ({*p.isa, *p.withheld} for p in (one, other))
            assert of_one == of_other, (shared, one.id, other.id)


def test_features_that_imply_others_come_with_them() -> None:
    """Arm's architecture: the matrix product needs dot products, SVE2 needs SVE, all need NEON."""
    implied = {
        "dotprod": "neon",
        "fp16": "neon",
        "i8mm": "dotprod",
        "bf16": "dotprod",
        "sve": "fp16",
        "sve2": "sve",
        "sve_i8mm": "sve",
        "sve_bf16": "sve",
        "avx2": "avx",
        "avx512f": "avx2",
        "avx512_vnni": "avx512f",
        "avx512_bf16": "avx512f",
    }
    for profile in bundled_profiles():
        for feature in profile.isa:
            assert implied.get(feature, feature) in profile.isa, (profile.id, feature)


def test_a_published_peak_is_its_own_arithmetic() -> None:
    """Where the source states rate and width, as in `LPDDR5X-7500, of 128 bits: 7.5 x 16`."""
    seen = 0
    for profile in bundled_profiles():
        source = profile.sources.get("peak_gb_per_s", "")
        factors = re.search(r": ([\d.]+) x (\d+)", source)
        if factors:
            seen += 1
            product = float(factors[1]) * float(factors[2])
            assert profile.peak_gb_per_s == pytest.approx(product, abs=0.05), profile.id
    assert seen >= 4


def test_unknown_device_names_the_nearest() -> None:
    with pytest.raises(EdgekitError, match=r"'galaxy-s26'.*did you mean galaxy-s25"):
        find_profile("galaxy-s26")
    with pytest.raises(EdgekitError, match=r"'toaster'.*known: local, galaxy-s24"):
        find_profile("toaster")


def test_minimal_profile() -> None:
    profile = parse_profile(raw_profile())
    assert profile.clusters[0].count == 4
    assert profile.withheld == {}
    assert profile.aliases == ()
    assert profile.bandwidth == (10, "peak")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": "red", "speed": 1}, r"unknown key colour, speed; allowed: id, name"),
        ({"name": None, "sources": None}, r"missing key name, sources"),
        ({"sources": "its data sheet"}, r"sources is 'its data sheet'; .*a table \[sources\]"),
        ({"sources": {}}, r"no source for clusters, isa, peak_gb_per_s, ram_gb: name it"),
        ({"page_size": "4 KiB"}, r"no source for page_size"),
        ({"peak_gb_per_s": None, "no_bandwidth": "secret"}, r"sources is 'peak_gb_per_s'"),
        ({"no_bandwidth": "it is secret"}, r"give peak_gb_per_s .*or no_bandwidth"),
        ({"withheld": {"dotprod": "off"}}, r"withheld is 'dotprod'; .*isa does not list"),
        ({"withheld": {"sve3": "off"}}, r"withheld is 'sve3'"),
        ({"withheld": {"sve": ""}}, r"withheld.sve is ''"),
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
