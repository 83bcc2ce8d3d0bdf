"""The engines: a folder for each, whose files are what it can do.

`decoder.py` runs language models (`open_engine`, `engine.py`), `network.py` networks of other kinds
(`open_module`, `network_engine.py`), `memory.py` says what it does with memory (`memory_model.py`),
`installed.py` what is installed of it (`library.py`), `facts.py` what a file says of itself
(`stated.py`), `files.py` what lies beside it (`runtime/engines/files.py`); `tokenizer.py` opens the
tokenizer in a file (`open_tokenizer`). A new engine is a folder and a line here.
"""

from edgekit.common.registry import Registry

ENGINES = Registry(
    "engine",
    {
        "executorch": "edgekit.runtime.engines.executorch",
        "gguf": "edgekit.runtime.engines.gguf",
        "onnx": "edgekit.runtime.engines.onnx",
        "torch": "edgekit.runtime.engines.torch",
    },
    {
        "decoder": "run language models",
        "network": "run networks of other kinds",
        "memory": "say what it does with memory",
        "installed": "say what is installed of it",
        "facts": "read what a file says of itself",
        "tokenizer": "read a tokenizer in a file",
        "files": "keep a model in several files",
    },
)
