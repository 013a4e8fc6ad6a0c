"""DPO with TRL's trainer and this package's head.

    python examples/trl_dpo.py --tiny                                    # a minute on a CPU, nothing is fetched
    python examples/trl_dpo.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset trl-lib/ultrafeedback_binarized

Needs `pip install 'dpo_kernels[trl]'`. What differs from a script for TRL is the import.
"""

from __future__ import annotations

import argparse
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig

from dpo_kernels.data.demo import demo_model, demo_preferences, demo_tokenizer
from dpo_kernels.trl import DPOTrainer  # instead of: from trl import DPOTrainer


def adapters(rank: int) -> Any:
    """On the head too, which TRL refuses."""
    from peft import LoraConfig

    return LoraConfig(r=rank, target_modules=["q_proj", "v_proj", "lm_head"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny model with random weights, and made-up preferences")
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct")
    parser.add_argument("--dataset", default="trl-lib/ultrafeedback_binarized")
    parser.add_argument("--output-dir", default="runs/trl_dpo")
    parser.add_argument(
        "--lora-r", type=int, default=0, help="train adapters of this rank, on the head too; 0: everything"
    )
    args = parser.parse_args()

    model: Any
    if args.tiny:
        dataset = demo_preferences(200)
        tokenizer = demo_tokenizer(str(row) for row in dataset)
        model = demo_model(len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    else:
        from datasets import load_dataset

        dataset = load_dataset(args.dataset, split="train")
        tokenizer, model = AutoTokenizer.from_pretrained(args.model), AutoModelForCausalLM.from_pretrained(args.model)

    trainer = DPOTrainer(
        model,
        args=DPOConfig(
            args.output_dir,
            learning_rate=1e-3 if args.tiny else 5e-7,
            max_steps=20 if args.tiny else -1,
            logging_steps=5,
            precompute_ref_log_probs=True,  # scored once, by the same head; no second model in memory
            report_to="none",
            save_strategy="no" if args.tiny else "steps",
            use_cpu=args.tiny,
            bf16=not args.tiny,
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=adapters(args.lora_r) if args.lora_r else None,
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    print(f"reward margin {logs[0]['rewards/margins']:.4f} to {logs[-1]['rewards/margins']:.4f}")


if __name__ == "__main__":
    main()
