"""What foreign patterns and templates may cost, and that a limit leaves no trace of itself."""

import json
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest

from edgekit.common import limits
from edgekit.errors import EdgekitError
from edgekit.models.chat_template import ChatTemplate
from edgekit.quantize.recipe import Recipe, resolve

NAME = "model.layers.0.feed_forward.w1.weight"


@pytest.fixture(autouse=True)
def little_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A fraction of a second is enough to see the limit hold."""
    monkeypatch.setattr(limits, "CPU_SECONDS", 0.3)
    before = signal.getsignal(signal.SIGPROF), resource.getrlimit(resource.RLIMIT_AS)
    yield
    assert signal.getitimer(signal.ITIMER_PROF)[0] == 0
    assert (signal.getsignal(signal.SIGPROF), resource.getrlimit(resource.RLIMIT_AS)) == before


def recipe(folder: Path, pattern: str) -> Recipe:
    file = folder / "recipe.json"
    file.write_text(json.dumps({"rules": [{"pattern": pattern, "scheme": "w8"}]}))
    return Recipe.load(file)


@pytest.mark.parametrize(
    "pattern",
    ["(([a-z._0-9])+)+!", "(.*)*x!", "(.|.)*!", ".*" * 12 + "!"],
)
def test_a_pattern_that_would_match_for_ever_is_one_error(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(EdgekitError, match=r"^recipe.json: matching its patterns takes more than"):
        resolve(recipe(tmp_path, pattern), {NAME: (64, 64)})


@pytest.mark.parametrize(
    "pattern",
    ["(", "a{99999999999}", "(?L).*", "(?<=a+)b", "x" * 100_000],
)
def test_a_pattern_that_does_not_compile_is_one_error(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(EdgekitError, match=r"recipe.json: rule 1: pattern '.*") as caught:
        recipe(tmp_path, pattern)
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


def test_a_doubtful_spelling_is_no_warning(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    recipe(tmp_path, "[[a].*")
    assert not recwarn.list


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{% for i in range(9999) %}" * 3 + "{% endfor %}" * 3, "s"),
        ("{% set n = 999999999 %}{{ n**n }}", "s"),
        ("{{ 'x' * 10**10 }}", "memory"),
        ("{{ 'x'|center(10**10) }}", "memory"),
        ("{{ '%9999999999d' % 1 }}", "memory"),
        (
            "{% set ns = namespace(x='xx') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}"
            + "{% endfor %}",
            "(memory|s)",  # what it meets first depends on how busy the machine is
        ),
        ("{% for i in range(9999) %}{{ 'x' * 99999 }}{% endfor %}", "(memory|s)"),
    ],
)
def test_a_template_that_would_never_end_is_one_error(text: str, what: str) -> None:
    with pytest.raises(EdgekitError, match=rf"chat template: takes more than .*{what}$"):
        ChatTemplate(text).render([])


def test_other_threads_work_without_the_limit_of_time() -> None:
    said: list[str] = []
    thread = Thread(target=lambda: said.append(ChatTemplate("{{ 1 + 1 }}").render([])))
    thread.start()
    thread.join()
    assert said == ["2"]
