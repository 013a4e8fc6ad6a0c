"""Measures the token lengths of preference pairs.

    python benchmarks/lengths.py preferences_en.jsonl dpo_kernels/data/lengths.json

The tokenizer is a byte-level BPE trained on the same texts, its chat template ChatML. The file holds numbers alone, so
that the benchmark has the shapes of real batches without the data.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import datasets

from dpo_kernels.data import load_preferences, tokenize_preferences
from dpo_kernels.data.demo import demo_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preferences", help="a file or dataset that dpo_kernels.data.load_preferences takes")
    parser.add_argument("out", type=Path)
    parser.add_argument("--vocab", type=int, default=32768, help="entries of the tokenizer")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as cache:
        datasets.config.HF_DATASETS_CACHE = Path(cache)
        dataset = load_preferences(args.preferences, cache_dir=cache)
        texts = [
            message["content"] for row in dataset for part in ("prompt", "chosen", "rejected") for message in row[part]
        ]
        tokenizer = demo_tokenizer(texts, args.vocab)
        tokenized, _ = tokenize_preferences(dataset, tokenizer, max_length=None)
        columns = ("prompt_ids", "chosen_ids", "rejected_ids")
        lengths = [[len(row[name]) for name in columns] for row in tokenized]
    head = {
        "what": "tokens of (prompt, chosen, rejected) of each preference pair, before any cut",
        "source": Path(args.preferences).name,
        "tokenizer": f"byte-level BPE of {len(tokenizer)} entries trained on the same texts, ChatML",
    }
    lines = ",\n".join(f"    {row}" for row in lengths)
    args.out.write_text(json.dumps(head, indent=2)[:-2] + f',\n  "lengths": [\n{lines}\n  ]\n}}\n')


if __name__ == "__main__":
    main()
