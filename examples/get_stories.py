"""Fetch the texts that the documentation uses: stories.txt and train.txt, 0.8 MB each.

    python examples/get_stories.py

They are the beginning and the end of TinyStories' validation split (Eldan and Li, arXiv
2305.07759; dataset `roneneldan/TinyStories` of the Hugging Face hub, CDLA-Sharing-1.0), the text
that lfm2-tiny was trained on the like of. The download is 19 MB, into the hub's cache.
"""

from pathlib import Path

from huggingface_hub import hf_hub_download

BYTES = 800_000


def main() -> None:
    """Fetch the split and write its two ends."""
    path = hf_hub_download("roneneldan/TinyStories", "TinyStories-valid.txt", repo_type="dataset")
    text = Path(path).read_bytes()
    for name, part in (("stories.txt", text[:BYTES]), ("train.txt", text[-BYTES:])):
        whole = part.decode("utf-8", errors="ignore")  # a character that is cut is left out
        Path(name).write_text(whole, encoding="utf-8")
        print(f"wrote {name}")


if __name__ == "__main__":
    main()
