"""Ids and addresses of models on the hub, as people paste them."""

import pytest

from edgekit.errors import EdgekitError
from edgekit.models.hub_name import HubName, one_revision, parse_hub_name


@pytest.mark.parametrize(
    ("text", "revision"),
    [
        ("org/name", None),
        ("org/name/", None),
        (" org/name\n", None),
        ("models/org/name", None),
        ("org/name@v1", "v1"),
        ("org/name@feature/x", "feature/x"),
        ("org/name@refs/pr/1", "refs/pr/1"),
        ("org/name/tree/main", "main"),
        ("hf://org/name", None),
        ("hf://models/org/name@v1", "v1"),
        ("hf://org/name@v1/config.json", "v1"),
        ("hf://org/name@refs/pr/1/config.json", "refs/pr/1"),
        ("huggingface.co/org/name", None),
        ("hf.co/org/name", None),
        ("https://huggingface.co/org/name", None),
        ("https://www.huggingface.co/org/name/", None),
        ("HTTPS://HuggingFace.co/org/name?library=transformers", None),
        ("https://huggingface.co/org/name/tree/main", "main"),
        ("https://huggingface.co/org/name/tree/refs%2Fpr%2F1", "refs/pr/1"),
        ("https://huggingface.co/org/name/tree/refs/pr/1", "refs/pr/1"),
        ("https://huggingface.co/org/name/tree/feature%2Fx", "feature/x"),
        ("https://huggingface.co/org/name/blob/feature%2Fx/config.json", "feature/x"),
        ("https://huggingface.co/org/name/blob/v1/config.json#L3", "v1"),
        ("https://huggingface.co/org/name/resolve/v1/model.safetensors", "v1"),
        ("https://huggingface.co/org/name/commit/abc", "abc"),
        ("https://huggingface.co/org/name/discussions/3", None),
        ("https://huggingface.co/api/models/org/name", None),
    ],
)
def test_what_names_a_model(text: str, revision: str | None) -> None:
    assert parse_hub_name(text) == HubName("org/name", revision)


@pytest.mark.parametrize(
    "text",
    ["", "name", "/org/name", "./org/name", "~/org", "a//b", "a/b/c", "a b/c", "-a/b", "a/b:c"],
)
def test_what_is_no_name_on_the_hub(text: str) -> None:
    assert parse_hub_name(text) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("https://huggingface.co/datasets/org/name", "names a data set on the hub, no model"),
        ("hf://datasets/org/name", "names a data set"),
        ("datasets/org/name", "names a data set"),
        ("https://huggingface.co/spaces/org/name", "names a space on the hub, no model"),
        ("https://huggingface.co/org", "names no model on the hub; give ORG/NAME"),
        ("https://huggingface.co", "names no model on the hub"),
        ("https://example.com/org/name", "is no address of the hub, whose host is huggingface.co"),
        ("s3://org/name", "is no address of the hub"),
        ("https://[::1/org/name", "is no address of the hub"),
        ("org/name@", "names no revision behind the @"),
    ],
)
def test_addresses_of_something_else(text: str, words: str) -> None:
    with pytest.raises(EdgekitError, match=words):
        parse_hub_name(text)


def test_a_mirror_is_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example:8443")
    found = parse_hub_name("https://mirror.example:8443/org/name/tree/v1")
    assert found == HubName("org/name", "v1")


def test_one_revision() -> None:
    assert one_revision("x", None, None) is None
    assert one_revision("x", "v1", None) == one_revision("x", None, "v1") == "v1"
    assert one_revision("x", "v1", "v1") == "v1"
    with pytest.raises(EdgekitError, match="x: names revision 'v1', `revision` 'v2': give one"):
        one_revision("x", "v1", "v2")
