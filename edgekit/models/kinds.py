"""What a path is that is not a model folder, and what to do with it."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from edgekit.common.files import first_bytes, stand_in

ADAPTER_CONFIG = "adapter_config.json"
_FINISHED = {".gguf": "llama.cpp", ".onnx": "ONNX Runtime", ".pte": "ExecuTorch"}
_UNFINISHED = (".incomplete", ".partial", ".part", ".crdownload", ".download", ".aria2")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_PICKLE_ADVICE = "which can run code and is not loaded"
_OTHERS = (".h5", ".msgpack")
_OF_A_TRAINER = ("optimizer", "scheduler", "training_args", "rng_state")


def file_kind(path: Path) -> str:
    """Say what a file is that was given in a model's place."""
    found = stand_in(path)
    if found is not None:
        return found
    head, end = first_bytes(path, 512), path.suffix.lower()
    if head.startswith(b"GGUF"):
        return _finished(".gguf")
    if end in _FINISHED:
        return _finished(end)
    if end == ".safetensors":
        return "is a file of weights; give the folder that holds it together with its config.json"
    if end in _PICKLES:
        return f"is a pickle of torch's, {_PICKLE_ADVICE}; give a folder in Hugging Face layout"
    if (
        head.startswith((b"PK\x03\x04", b"\x1f\x8b", b"BZh", b"\xfd7zXZ"))
        or head[257:262] == b"ustar"
    ):
        return "is an archive: unpack it, and give the folder in it that holds config.json"
    if path.name.endswith(_UNFINISHED):
        return "is a download that did not finish: download it again"
    return "is a file; give the folder that holds config.json"


def folder_without_config(folder: Path) -> str:
    """Say what a folder is that holds no config.json."""
    return _named(_names_in(folder), folder) or _NO_CONFIG


def folder_without_weights(folder: Path, wanted: str) -> str:
    """Say what a folder with a config.json holds instead of the weights, `wanted`."""
    names = _names_in(folder)
    return _named(names, folder) or _weights(names, str(folder)) or wanted


def repository_without_config(names: Sequence[str]) -> str:
    """Say what a repository of the hub is, by its files' names, that holds no config.json."""
    return _named(sorted(names), None) or _NO_CONFIG


def repository_without_weights(hub_id: str, names: Sequence[str]) -> str:
    """Say what a repository of the hub with a config.json holds in place of the weights."""
    found = sorted(names)
    return _named(found, None) or _weights(found, hub_id) or "holds no weights as safetensors"


_NO_CONFIG = "holds no config.json, so it is not a model folder"


def _names_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def _named(names: list[str], folder: Path | None) -> str | None:
    """Return what some file says that its folder, or where there is None its repository, is."""
    if ADAPTER_CONFIG in names:
        given = "DIR, a folder that it is downloaded to"
        if folder is not None:
            given = f"{shlex.quote(str(folder))}{_base(folder)}"
        return (
            "is an adapter, not a model: give the model that it was trained on, with "
            f"`adapter` {given}"
        )
    if "model_index.json" in names:
        return (
            "is a pipeline of diffusers, not a language model: its parts export one by one, as "
            "modules (FILE.py:FUNCTION)"
        )
    if any(name.startswith("consolidated.") for name in names):
        return (
            "holds its weights in the layout of their authors (consolidated.*), with other names: "
            "give the same model in Hugging Face layout (config.json and model.safetensors)"
        )
    unfinished = [name for name in names if name.endswith(_UNFINISHED)]
    if unfinished:
        return f"{unfinished[0]} in it is a download that did not finish: download it again"
    finished = [name for name in names if Path(name).suffix.lower() in _FINISHED]
    if finished and not any(name.endswith(".safetensors") for name in names):
        return f"{finished[0]} in it {_finished(Path(finished[0]).suffix.lower())}"
    return None


def _weights(names: list[str], place: str) -> str | None:
    """Return what weights there are, at `place`, a folder or a hub id."""
    stored = [name for name in names if name.endswith(".safetensors")]
    shard = next((name for name in stored if "-of-" in name), None)
    if shard is not None:
        return (
            f"holds {shard}, a shard, and no model.safetensors.index.json, which says what is "
            "in each: download it too"
        )
    if stored:
        return f"holds {stored[0]}, but no model.safetensors: if that is the model, rename it"
    weights = [name for name in names if not name.startswith(_OF_A_TRAINER)]
    pickle = next((name for name in weights if name.endswith(_PICKLES)), None)
    if pickle is not None:
        out = f"{place.rstrip('/')}-safetensors"
        program = (
            "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
            f"M.from_pretrained({place!r}).save_pretrained({out!r}); "
            f"T.from_pretrained({place!r}).save_pretrained({out!r})"
        )
        return (
            f"holds its weights as {pickle}, a pickle, {_PICKLE_ADVICE}: convert them once: "
            f"python -c {shlex.quote(program)}"
        )
    other = next((name for name in weights if name.endswith(_OTHERS)), None)
    if other is not None:
        return (
            f"holds its weights as {other}, of another framework: give the safetensors of the "
            "model, or what transformers' save_pretrained makes of them"
        )
    return None


def _finished(end: str) -> str:
    return (
        f"is a finished model for {_FINISHED[end]}, which `edgekit run` and `bench` take; an "
        "export starts from what it was made of (a folder with config.json and safetensors)"
    )


def _base(folder: Path) -> str:
    from edgekit.common.files import load_json_object

    base = load_json_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    known = isinstance(base, str) and base.isprintable() and base
    return f"; that is {base:.100}" if known else ""
