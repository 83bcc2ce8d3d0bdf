"""`edgekit devices`: the list, one device, this machine, and an unknown one."""

import json
import subprocess
import sys

from click.testing import CliRunner, Result

from edgekit.cli import main
from edgekit.devices.profile import bundled_profiles


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["devices", *arguments])


def test_list_names_this_machine_and_every_profile() -> None:
    result = run()
    assert result.exit_code == 0
    names = ["local", *(profile.id for profile in bundled_profiles())]
    for table in result.stdout.split("\n\n"):
        assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == names


def test_list_as_json() -> None:
    listed = json.loads(run("--json").stdout)
    assert listed["local"]["python"]
    assert [profile["id"] for profile in listed["profiles"]] == [p.id for p in bundled_profiles()]


def test_one_device() -> None:
    text = run("pi5").stdout
    assert "sustained bandwidth            12.6 GB/s" in text
    assert "16 KiB by default" in text
    facts = json.loads(run("raspberry-pi-5", "--json").stdout)
    assert facts["clusters"] == [{"core": "Cortex-A76", "count": 4, "max_ghz": 2.4}]
    assert facts["ram_gb"] == [2, 4, 8, 16]


def test_unknown_facts_of_a_profile_are_said_to_be_unknown() -> None:
    text = run("pixel-9").stdout
    assert "peak bandwidth          unknown" in text
    assert "no bandwidth            Google publishes neither" in text
    assert json.loads(run("pixel-9", "--json").stdout)["peak_gb_per_s"] is None


def test_this_machine() -> None:
    assert run("local").stdout.startswith("device        local\n")
    facts = json.loads(run("LOCAL", "--json").stdout)
    assert set(facts) >= {"cpu", "isa", "page_bytes", "ram_bytes", "conditions"}


def test_unknown_device() -> None:
    result = run("raspbery-pi-5")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("edgekit: unknown device 'raspbery-pi-5': did you mean rasp")


def test_devices_need_neither_numpy_nor_torch() -> None:
    code = (
        "import sys; from edgekit.devices import report;"
        "from edgekit.devices.probe import bandwidth;"
        "report.describe_devices();"
        "sys.exit(', '.join({'numpy', 'torch'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
