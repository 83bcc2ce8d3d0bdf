"""The targets: a folder for each, whose files are what it can do.

`layout.py` tells what a language model takes there (`contract/layout.py`), without torch, and
`decoder.py` writes it (`contract/writer.py`); `network.py` writes any other traced network
(`contract/network_target.py`), `inspect.py` reports on a file (`inspect/report.py`), `readback.py`
reads the weights back (`readback.py`); `own_formats.py` are those that the engine quantizes to
(`contract/own_formats.py`). A new target is a folder and a line here.
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
        "layout": "hold language models",
        "decoder": "hold language models",
        "network": "hold networks of other kinds, only the architectures that its engine knows",
        "inspect": "be inspected",
        "readback": "give its weights back",
        "own_formats": "hold formats that its engine quantizes to",
    },
)
