"""DPO in a loop of one's own: nothing but PyTorch around the model.

    python examples/hand_written_loop.py --tiny                          # a minute on a CPU, nothing is fetched
    python examples/hand_written_loop.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset preferences.jsonl

Needs `pip install 'dpo_kernels[train]'`, for the model and the data.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_kernels import LMHead
from dpo_kernels.data import PairCollator, load_preferences, tokenize_preferences
from dpo_kernels.data.demo import demo_model, demo_preferences, demo_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny model with random weights, and made-up preferences")
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct")
    parser.add_argument("--dataset", default="preferences.jsonl")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=8, help="in a step")
    args = parser.parse_args()

    model: Any
    if args.tiny:
        dataset = demo_preferences(200)
        tokenizer: Any = demo_tokenizer(str(row) for row in dataset)
        model = demo_model(len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    else:
        dataset = load_preferences(args.dataset)
        tokenizer, model = AutoTokenizer.from_pretrained(args.model), AutoModelForCausalLM.from_pretrained(args.model)
    pairs, _ = tokenize_preferences(dataset, tokenizer)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device)
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3 if args.tiny else 5e-7, weight_decay=0.0)
    collate = PairCollator(tokenizer.pad_token_id)

    # Here is all of dpo_kernels: two heads, the reference's log-probabilities, and the loss.
    head, reference_head = LMHead.from_model(model), LMHead.from_model(reference)
    for step in range(args.steps):
        batch = collate([pairs[(step * args.pairs + i) % len(pairs)] for i in range(args.pairs)])
        inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        labels, options = batch["labels"].to(device), {"shift": True, "num_labelled": batch["num_labelled"]}
        with torch.no_grad():
            hidden, _ = reference_head.hidden_states(**inputs)
            ref_logps = reference_head.sequence_logps(hidden, labels, **options).logps
        hidden, _ = head.hidden_states(**inputs)
        output = head.dpo_loss(hidden, labels, ref_logps, beta=0.1, **options)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        margin = (output.chosen_rewards - output.rejected_rewards).mean()
        print(f"step {step + 1}  loss {output.loss.item():.4f}  margin {margin.item():.4f}")


if __name__ == "__main__":
    main()
