"""DPO with `transformers.Trainer`: the loss goes into the model's forward, where autocast and DDP expect it.

    python examples/transformers_trainer.py --tiny                       # a minute on a CPU, nothing is fetched
    python examples/transformers_trainer.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset preferences.jsonl

Needs `pip install 'dpo_kernels[train]'`.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from dpo_kernels.data import PairCollator, load_preferences, tokenize_preferences
from dpo_kernels.data.demo import demo_model, demo_preferences, demo_tokenizer
from dpo_kernels.models import Preference, Reference, add_fused_lm_head


class PreferenceTrainer(Trainer):
    def __init__(self, model: Any, **options: Any) -> None:
        super().__init__(model, **options)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over pairs: accumulation divides it
        self.reference = copy.deepcopy(self.model).eval().requires_grad_(False)
        for each in (self.model, self.reference):
            add_fused_lm_head(each)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        options = {"beta": 0.1} | {name: inputs[name] for name in ("token_weights", "pair_weights") if name in inputs}
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")} | {"fused_lm_head": True}
        like_the_policy = Reference.of(self.model, options)
        with torch.no_grad(), self.accelerator.autocast():
            ref_logps = self.reference(**inputs, reference=like_the_policy).logps
        found = model(**inputs, preference=Preference(ref_logps, **options)).preference
        return (found.loss, {"logps": found.logps}) if return_outputs else found.loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny model with random weights, and made-up preferences")
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct")
    parser.add_argument("--dataset", default="preferences.jsonl")
    parser.add_argument("--output-dir", default="runs/transformers_trainer")
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
    trainer = PreferenceTrainer(
        model,
        args=TrainingArguments(
            args.output_dir,
            learning_rate=1e-3 if args.tiny else 5e-7,
            max_steps=20 if args.tiny else -1,
            per_device_train_batch_size=8,
            logging_steps=5,
            remove_unused_columns=False,  # the collator knows which it takes
            report_to="none",
            save_strategy="no" if args.tiny else "steps",
            use_cpu=args.tiny,
        ),
        train_dataset=pairs,
        data_collator=PairCollator(tokenizer.pad_token_id),
    )
    trainer.train()


if __name__ == "__main__":
    main()
