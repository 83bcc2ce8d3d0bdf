"""The probe on recorded trees: an x86 PC, a Raspberry Pi 5, a big.LITTLE phone, and nothing."""

import json
import platform
import struct
from pathlib import Path

import pytest

from edgekit.devices.hosts.local import LocalHost
from edgekit.devices.probe.conditions import Temperature, conditions
from edgekit.devices.probe.cpuinfo import ISA_FEATURES, isa_features, read_processors
from edgekit.devices.probe.machine import Cache, Cluster, Machine, probe

CPU = "sys/devices/system/cpu"

X86_FLAGS = (
    "fpu sse sse2 ht lm sse4_2 avx f16c avx2 fma avx512f avx512bw avx512vl avx512_vnni avx_vnni "
    "avx512_bf16 amx_tile amx_int8"
)
PI_FEATURES = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimddp"
PHONE_FEATURES = PI_FEATURES + " i8mm bf16 sve sve2"


def write_tree(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def auxv(page_bytes: int) -> bytes:
    """AT_HWCAP, AT_PAGESZ, AT_NULL, as the kernel hands them to a process."""
    return b"".join(struct.pack("<QQ", *pair) for pair in ((16, 0xFF), (6, page_bytes), (0, 0)))


def meminfo(**kilobytes: int) -> str:
    return "".join(f"{name}: {value:>10} kB\n" for name, value in kilobytes.items())


def cpufreq(cpu: int, low: int, high: int, now: int, governor: str) -> dict[str, str | bytes]:
    folder = f"{CPU}/cpu{cpu}/cpufreq"
    return {
        f"{folder}/cpuinfo_min_freq": f"{low}\n",
        f"{folder}/cpuinfo_max_freq": f"{high}\n",
        f"{folder}/scaling_cur_freq": f"{now}\n",
        f"{folder}/scaling_governor": f"{governor}\n",
    }


def caches(cpu: int, *entries: tuple[int, str, str, str]) -> dict[str, str | bytes]:
    files: dict[str, str | bytes] = {}
    for index, entry in enumerate(entries):
        for name, value in zip(("level", "type", "size", "shared_cpu_list"), entry, strict=True):
            files[f"{CPU}/cpu{cpu}/cache/index{index}/{name}"] = f"{value}\n"
    return files


def arm_block(cpu: int, features: str, implementer: str, part: str) -> str:
    return (
        f"processor\t: {cpu}\nBogoMIPS\t: 108.00\nFeatures\t: {features}\n"
        f"CPU implementer\t: {implementer}\nCPU architecture: 8\nCPU variant\t: 0x4\n"
        f"CPU part\t: {part}\nCPU revision\t: 1\n"
    )


@pytest.fixture
def pc(tmp_path: Path) -> Path:
    """Two cores with two threads each; an L2 per core and one L3."""
    blocks = [
        f"processor\t: {cpu}\nvendor_id\t: GenuineIntel\nmodel name\t: A Processor @ 2.80GHz\n"
        f"cpu MHz\t\t: {2000 + cpu}.500\nflags\t\t: {X86_FLAGS}\n"
        for cpu in range(4)
    ]
    files: dict[str, str | bytes] = {
        "proc/cpuinfo": "\n".join(blocks),
        "proc/meminfo": meminfo(
            MemTotal=16_000_000, MemAvailable=9_000_000, SwapTotal=2_000_000, SwapFree=1_500_000
        ),
        "proc/loadavg": "0.52 0.58 0.59 1/345 4242\n",
        "proc/self/auxv": auxv(4096),
        "proc/sys/kernel/ostype": "Linux\n",
        "proc/sys/kernel/osrelease": "6.8.0-45-generic\n",
        "etc/os-release": 'NAME="Ubuntu"\nPRETTY_NAME="Ubuntu 24.04.1 LTS"\n',
        "sys/class/dmi/id/product_name": "Some Laptop\n",
        "sys/class/hwmon/hwmon0/name": "coretemp\n",
        "sys/class/hwmon/hwmon0/temp1_input": "48000\n",
        "sys/class/hwmon/hwmon0/temp1_label": "Package id 0\n",
        "sys/class/hwmon/hwmon0/temp2_input": "46500\n",
        "sys/class/hwmon/hwmon1/name": "fan_only\n",
    }
    for cpu in range(4):
        pair = "0-1" if cpu < 2 else "2-3"
        files[f"{CPU}/cpu{cpu}/topology/thread_siblings_list"] = f"{pair}\n"
        files |= caches(
            cpu,
            (1, "Data", "48K", pair),
            (1, "Instruction", "32K", pair),
            (2, "Unified", "1280K", pair),
            (3, "Unified", "12M", "0-3"),
        )
    return write_tree(tmp_path, files)


@pytest.fixture
def pi(tmp_path: Path) -> Path:
    blocks = [arm_block(cpu, PI_FEATURES, "0x41", "0xd0b") for cpu in range(4)]
    board = "Revision\t: d04170\nSerial\t\t: 1234567890abcdef\nModel\t\t: Raspberry Pi 5 Model B\n"
    files: dict[str, str | bytes] = {
        "proc/cpuinfo": "\n".join([*blocks, board]),
        "proc/device-tree/model": b"Raspberry Pi 5 Model B Rev 1.0\0",
        "proc/meminfo": meminfo(MemTotal=8_256_000, MemAvailable=7_000_000),
        "proc/self/auxv": auxv(16384),
        "proc/sys/kernel/arch": "aarch64\n",
        "proc/sys/kernel/ostype": "Linux\n",
        "proc/sys/kernel/osrelease": "6.6.31+rpt-rpi-2712\n",
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
        "sys/class/thermal/thermal_zone0/temp": "51250\n",
    }
    for cpu in range(4):
        files[f"{CPU}/cpu{cpu}/topology/thread_siblings_list"] = f"{cpu}\n"
        files |= cpufreq(cpu, 1_500_000, 2_400_000, 2_400_000 - cpu, "ondemand")
        files |= caches(cpu, (2, "Unified", "512K", str(cpu)), (3, "Unified", "2048K", "0-3"))
    return write_tree(tmp_path, files)


@pytest.fixture
def phone(tmp_path: Path) -> Path:
    """Android-like: three core types, no cache sizes, a zone that cannot be read as a number."""
    layout = [(range(4), "0xd80", 1_920_000), (range(4, 7), "0xd81", 2_600_000)]
    layout.append((range(7, 8), "0xd82", 3_100_000))
    blocks, files = [], dict[str, str | bytes]()
    for cpus, part, high in layout:
        for cpu in cpus:
            features = PHONE_FEATURES + (" sme" if part == "0xd82" else "")
            blocks.append(arm_block(cpu, features, "0x41", part))
            files |= cpufreq(cpu, 300_000, high, high // 2, "sched_pixel")
            files[f"{CPU}/cpu{cpu}/topology/thread_siblings_list"] = f"{cpu}\n"
    return write_tree(
        tmp_path,
        files
        | {
            "proc/cpuinfo": "\n".join(blocks),
            "proc/meminfo": meminfo(
                MemTotal=11_800_000, MemAvailable=4_000_000, SwapTotal=6_000_000, SwapFree=1_000_000
            ),
            "sys/class/thermal/thermal_zone0/type": "BIG\n",
            "sys/class/thermal/thermal_zone0/temp": "39000\n",
            "sys/class/thermal/thermal_zone1/temp": "off\n",
            "sys/class/thermal/thermal_zone10/type": "battery\n",
            "sys/class/thermal/thermal_zone10/temp": "31500\n",
            "sys/class/thermal/thermal_zone2/temp": "-500\n",
        },
    )


def test_pc(pc: Path) -> None:
    machine = probe(LocalHost(pc))
    assert machine == Machine(
        device="Some Laptop",
        cpu="A Processor @ 2.80GHz",
        vendor="GenuineIntel",
        architecture="x86_64",
        isa=(
            *("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl"),
            *("avx512_vnni", "avx512_bf16", "avx_vnni", "amx_tile", "amx_int8"),
        ),
        clusters=(Cluster("A Processor @ 2.80GHz", (0, 1, 2, 3), None, None, None),),
        physical_cores=2,
        logical_cores=4,
        cpu_quota=None,
        caches=(
            Cache(1, "data", 48 * 1024, 2),
            Cache(1, "instruction", 32 * 1024, 2),
            Cache(2, "unified", 1280 * 1024, 2),
            Cache(3, "unified", 12 * 1024**2, 1),
        ),
        ram_bytes=16_000_000 * 1024,
        swap_bytes=2_000_000 * 1024,
        page_bytes=4096,
        os="Ubuntu 24.04.1 LTS",
        kernel="6.8.0-45-generic",
        python=platform.python_version(),
        conditions=conditions(LocalHost(pc)),
    )
    assert machine.last_level_cache_bytes == 12 * 1024**2


def test_pc_conditions(pc: Path) -> None:
    now = conditions(LocalHost(pc))
    assert now.temperatures == (
        Temperature("coretemp Package id 0", 48.0),
        Temperature("coretemp temp2", 46.5),
    )
    assert now.frequency_mhz == (2000.5, 2001.5, 2002.5, 2003.5)  # `cpu MHz`: no cpufreq here
    assert now.load_average == (0.52, 0.58, 0.59)
    assert now.ram_available_bytes == 9_000_000 * 1024
    assert now.swap_used_bytes == 500_000 * 1024


def test_raspberry_pi(pi: Path) -> None:
    machine = probe(LocalHost(pi))
    assert machine.device == "Raspberry Pi 5 Model B Rev 1.0"
    assert machine.cpu == "4x Cortex-A76"
    assert machine.vendor == "ARM"
    assert machine.architecture == "aarch64"
    assert machine.isa == ("neon", "fp16", "dotprod")
    assert machine.clusters == (Cluster("Cortex-A76", (0, 1, 2, 3), 1500.0, 2400.0, "ondemand"),)
    assert (machine.physical_cores, machine.logical_cores) == (4, 4)
    assert machine.page_bytes == 16384
    assert machine.os == "Linux"
    assert machine.caches[0] == Cache(2, "unified", 512 * 1024, 4)
    assert machine.swap_bytes is None
    assert machine.conditions.swap_used_bytes is None
    assert machine.conditions.load_average is None
    assert machine.conditions.frequency_mhz[1] == 2399.999
    assert machine.conditions.temperatures == (Temperature("cpu-thermal", 51.25),)


def test_serial_numbers_are_not_recorded(pi: Path) -> None:
    assert "1234567890abcdef" not in json.dumps(probe(LocalHost(pi)).to_dict())


def test_phone(phone: Path) -> None:
    machine = probe(LocalHost(phone))
    assert machine.cpu == "4x Cortex-A520 + 3x Cortex-A720 + 1x Cortex-X4"
    assert [cluster.cpus for cluster in machine.clusters] == [(0, 1, 2, 3), (4, 5, 6), (7,)]
    assert [cluster.max_mhz for cluster in machine.clusters] == [1920.0, 2600.0, 3100.0]
    assert machine.architecture == "aarch64"  # proven by the feature words, no /proc/sys entry
    assert machine.isa is not None
    assert {"dotprod", "i8mm", "bf16", "sve2"} <= set(machine.isa)
    assert "sme" not in machine.isa  # one core alone has it, and a thread may run on any
    assert machine.caches == ()
    assert machine.last_level_cache_bytes is None
    assert machine.page_bytes is None
    assert machine.conditions.swap_used_bytes == 5_000_000 * 1024
    assert machine.conditions.temperatures == (  # zones in the order of their numbers
        Temperature("BIG", 39.0),
        Temperature("thermal_zone2", -0.5),
        Temperature("battery", 31.5),
    )


def test_unknown_arm_core_is_given_by_its_numbers(tmp_path: Path) -> None:
    write_tree(tmp_path, {"proc/cpuinfo": arm_block(0, "fp asimd", "0x99", "0xabc")})
    machine = probe(LocalHost(tmp_path))
    assert machine.vendor == "implementer 0x99"
    assert machine.cpu == "1x implementer 0x99 part 0xabc"


def test_a_32_bit_system_has_smaller_words(tmp_path: Path) -> None:
    words = b"".join(struct.pack("<II", *pair) for pair in ((16, 0xFF), (6, 4096), (0, 0)))
    write_tree(tmp_path, {"proc/self/auxv": words})
    assert probe(LocalHost(tmp_path)).page_bytes == 4096


def test_nothing_readable_gives_nulls(tmp_path: Path) -> None:
    facts = probe(LocalHost(tmp_path)).to_dict()
    volatile = facts.pop("conditions")
    assert facts.pop("python") == platform.python_version()
    assert facts.pop("clusters") == facts.pop("caches") == ()
    assert set(facts.values()) == {None}
    assert volatile == {
        "temperatures": (),
        "frequency_mhz": (),
        "load_average": None,
        "ram_available_bytes": None,
        "swap_used_bytes": None,
    }


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("proc/loadavg", "busy\n"),
        ("proc/self/auxv", b"\x06\0\0"),
        ("proc/meminfo", "MemTotal: many kB\nMemAvailable\n"),
        (f"{CPU}/cpu0/cache/index0/size", "big\n"),
        ("proc/cpuinfo", "processor : first\n\n\0\xff"),
    ],
)
def test_malformed_files_read_as_unknown(tmp_path: Path, path: str, content: str | bytes) -> None:
    empty = probe(LocalHost(tmp_path))
    assert probe(LocalHost(write_tree(tmp_path, {path: content}))) == empty


def test_core_that_states_no_features_makes_them_unknown(tmp_path: Path) -> None:
    blocks = [arm_block(0, PI_FEATURES, "0x41", "0xd0b"), arm_block(1, "", "0x41", "0xd0b")]
    write_tree(tmp_path, {"proc/cpuinfo": "\n".join(blocks)})
    assert isa_features(read_processors(LocalHost(tmp_path))) is None


def test_32_bit_arm_spelling(tmp_path: Path) -> None:
    write_tree(tmp_path, {"proc/cpuinfo": arm_block(0, "half thumb neon vfpv4", "0x41", "0xd08")})
    machine = probe(LocalHost(tmp_path))
    assert machine.isa == ("neon",)
    assert machine.architecture is None


def test_this_machine_is_probed() -> None:
    if not Path("/proc/cpuinfo").exists():
        pytest.skip("no /proc on this system")
    machine = probe()
    assert machine.logical_cores and machine.ram_bytes and machine.page_bytes
    assert machine.conditions.ram_available_bytes
    assert machine.conditions.ram_available_bytes <= machine.ram_bytes
    assert machine.isa is None or set(machine.isa) <= set(ISA_FEATURES)
    assert json.loads(json.dumps(machine.to_dict()))["python"] == platform.python_version()
