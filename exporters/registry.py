"""The targets: a folder for each, whose files are what it can do.

`decoder.py` writes a language model (`contract/target.py`), `network.py` any other traced network
(`contract/network_target.py`), `inspect.py` reports on a file (`inspect/report.py`), `readback.py`
reads the weights back (`readback.py`). A new target is a folder and a line here.
"""

from edgekit.common.registry import Registry

TARGETS = Registry(
    "target",
    {
        "executorch": "edgekit.exporters.executorch",
        "gguf": "edgekit.exporters.gguf",
        "onnx": "edgekit.exporters.onnx",
    },
    {
        "decoder": "hold language models",
        "network": "hold networks of other kinds, only the architectures that its engine knows",
        "inspect": "be inspected",
        "readback": "give its weights back",
    },
)
