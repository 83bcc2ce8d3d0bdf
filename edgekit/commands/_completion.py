"""What a shell completes beside commands, options and files: names that edgekit knows.

bash, zsh and fish ask for it by click's means (README, Commands).
"""

import click
from click.shell_completion import CompletionItem

_SCHEMES = (
    *("w8", "w4", "w4g32", "w4g64", "w4g128", "w4g32a", "w5g32", "w6g16", "w8g32"),
    *("cb4", "cb3", "cb2", "cb4nl", "float", "w8a8", "w4a8"),
)
"""The usual ones: each group size would be a name of its own."""
_LLAMA_FORMATS = ("Q4_0", "Q8_0", "Q4_K_M", "Q5_K_M", "Q6_K", "IQ4_NL")


def models(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the models whose names begin so, each with its licence; files where there is none."""
    from edgekit.models.catalogue import catalogue

    begun = incomplete.lower()
    known = [
        (name, model) for model in catalogue().values() for name in (model.name, *model.aliases)
    ]
    found = [
        CompletionItem(name, help=model.licence) for name, model in known if name.startswith(begun)
    ]
    return found or [CompletionItem(incomplete, type="file")]


def targets(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the targets whose names begin so."""
    from edgekit.exporters.registry import TARGETS

    return [CompletionItem(name) for name in TARGETS.packages if name.startswith(incomplete)]


def devices(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return this machine and the devices whose names begin so, each with its full name."""
    from edgekit.devices.profile import LOCAL, bundled_profiles

    known = [(LOCAL, "this machine"), *((one.id, one.name) for one in bundled_profiles())]
    return [
        CompletionItem(name, help=text)
        for name, text in known
        if name.startswith(incomplete.lower())
    ]


def schemes(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the usual schemes whose names begin so, and llama.cpp's own formats."""
    names = (*_SCHEMES, *_LLAMA_FORMATS)
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]
