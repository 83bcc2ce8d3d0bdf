"""/proc/cpuinfo in its x86 and ARM spellings: processors, vendor, core names, ISA features."""

from dataclasses import dataclass

from edgekit.devices.hosts.host import Host
from edgekit.devices.probe.rootfs import key_values, read_text

# The kernel's spelling -> ours, for the features that decide which CPU kernels an engine may use.
# x86: arch/x86/include/asm/cpufeatures.h. ARM: arch/arm64/kernel/cpuinfo.c (and arch/arm's, where
# a 32-bit kernel prints `neon` for what 64-bit ones call `asimd`). Marketing names on the right:
# `dotprod` (FEAT_DotProd) is what `asimddp` means.
ISA_SPELLINGS = {
    "sse4_2": "sse4_2",
    "avx": "avx",
    "avx2": "avx2",
    "fma": "fma",
    "f16c": "f16c",
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512vl": "avx512vl",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "avx512_fp16": "avx512_fp16",
    "avx_vnni": "avx_vnni",
    "avx_vnni_int8": "avx_vnni_int8",
    "amx_tile": "amx_tile",
    "amx_int8": "amx_int8",
    "amx_bf16": "amx_bf16",
    "asimd": "neon",
    "neon": "neon",
    "asimdhp": "fp16",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "asimdbf16": "bf16",
    "sve": "sve",
    "sve2": "sve2",
    "svei8mm": "sve_i8mm",
    "svebf16": "sve_bf16",
    "sme": "sme",
    "sme2": "sme2",
}
ISA_FEATURES = tuple(dict.fromkeys(ISA_SPELLINGS.values()))

# `CPU implementer` and `CPU part` are MIDR_EL1 fields; the names are those of each vendor's
# manuals, as util-linux' lscpu-arm.c and the kernel's arch/arm64/include/asm/cputype.h list them.
ARM_VENDORS = {
    0x41: "ARM",
    0x42: "Broadcom",
    0x4E: "NVIDIA",
    0x51: "Qualcomm",
    0x53: "Samsung",
    0x61: "Apple",
    0xC0: "Ampere",
}
ARM_CORES = {
    (0x41, 0xD03): "Cortex-A53",
    (0x41, 0xD04): "Cortex-A35",
    (0x41, 0xD05): "Cortex-A55",
    (0x41, 0xD07): "Cortex-A57",
    (0x41, 0xD08): "Cortex-A72",
    (0x41, 0xD09): "Cortex-A73",
    (0x41, 0xD0A): "Cortex-A75",
    (0x41, 0xD0B): "Cortex-A76",
    (0x41, 0xD0C): "Neoverse-N1",
    (0x41, 0xD0D): "Cortex-A77",
    (0x41, 0xD40): "Neoverse-V1",
    (0x41, 0xD41): "Cortex-A78",
    (0x41, 0xD42): "Cortex-A78AE",
    (0x41, 0xD44): "Cortex-X1",
    (0x41, 0xD46): "Cortex-A510",
    (0x41, 0xD47): "Cortex-A710",
    (0x41, 0xD48): "Cortex-X2",
    (0x41, 0xD49): "Neoverse-N2",
    (0x41, 0xD4B): "Cortex-A78C",
    (0x41, 0xD4D): "Cortex-A715",
    (0x41, 0xD4E): "Cortex-X3",
    (0x41, 0xD4F): "Neoverse-V2",
    (0x41, 0xD80): "Cortex-A520",
    (0x41, 0xD81): "Cortex-A720",
    (0x41, 0xD82): "Cortex-X4",
    (0x41, 0xD85): "Cortex-X925",
    (0x41, 0xD87): "Cortex-A725",
    (0x51, 0x001): "Oryon",
}


@dataclass(frozen=True)
class Processor:
    """One block of /proc/cpuinfo: a logical CPU that is online."""

    cpu: int
    facts: dict[str, str]

    @property
    def flags(self) -> frozenset[str]:
        """Return the kernel's own feature words (x86 `flags`, ARM `Features`)."""
        return frozenset((self.facts.get("flags") or self.facts.get("Features") or "").split())

    @property
    def arm_ids(self) -> tuple[int, int] | None:
        """Return (implementer, part) of an ARM core; None elsewhere."""
        try:
            return int(self.facts["CPU implementer"], 16), int(self.facts["CPU part"], 16)
        except (KeyError, ValueError):
            return None

    @property
    def vendor(self) -> str | None:
        """Return who made the core; an ARM implementer without a name is given by its number."""
        if self.arm_ids is None:
            return self.facts.get("vendor_id")
        return ARM_VENDORS.get(self.arm_ids[0], f"implementer 0x{self.arm_ids[0]:02x}")

    @property
    def core(self) -> str | None:
        """Return the core's name: x86 `model name`, ARM by its identity registers."""
        if self.arm_ids is None:
            return self.facts.get("model name")
        implementer, part = self.arm_ids
        return ARM_CORES.get(self.arm_ids, f"implementer 0x{implementer:02x} part 0x{part:03x}")

    @property
    def mhz(self) -> float | None:
        """Return x86's `cpu MHz`, which virtual machines give where cpufreq is missing."""
        try:
            return float(self.facts["cpu MHz"])
        except (KeyError, ValueError):
            return None


def read_processors(host: Host) -> tuple[Processor, ...]:
    """Return the online logical CPUs in their order; empty when /proc/cpuinfo is unreadable."""
    blocks = (read_text(host, "/proc/cpuinfo") or "").split("\n\n")
    facts = [key_values(block.splitlines()) for block in blocks]
    return tuple(
        Processor(int(block["processor"]), block)
        for block in facts
        if block.get("processor", "").isdigit()
    )


def isa_features(processors: tuple[Processor, ...]) -> tuple[str, ...] | None:
    """Return the normalised features that every online core has, in `ISA_FEATURES` order.

    A thread may be moved between the cores of a big.LITTLE machine, so only what all cores share
    can be used. None when no core states its features.
    """
    if not processors or not all(processor.flags for processor in processors):
        return None
    common = frozenset.intersection(*(processor.flags for processor in processors))
    known = {ISA_SPELLINGS[flag] for flag in common if flag in ISA_SPELLINGS}
    return tuple(feature for feature in ISA_FEATURES if feature in known)


def architecture(host: Host, processors: tuple[Processor, ...]) -> str | None:
    """Return `uname -m`'s word as the kernel states it, or as the form of cpuinfo proves it.

    /proc/sys/kernel/arch exists since Linux 6.1. Before, `lm` (long mode) is x86-64's own flag,
    and `asimd` is printed by 64-bit ARM kernels alone.
    """
    stated = read_text(host, "/proc/sys/kernel/arch")
    if stated is not None or not processors:
        return stated
    flags = processors[0].flags
    if "lm" in flags:
        return "x86_64"
    return "aarch64" if "asimd" in flags else None
