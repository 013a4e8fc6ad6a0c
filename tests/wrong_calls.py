"""Wrong calls of everything that is public, and what a user reads then.

`python tests/wrong_calls.py` writes the table `wrong_calls.txt`: of each call what it gives now, and what it gave
before. The column of before stays as it is, or is that of `--before FILE`, which `--only-column FILE` wrote under
another version:

    cd /tmp && PYTHONPATH=/path/to/another/version python .../tests/wrong_calls.py --only-column before.json

In calls `given`, `pairs`, `both`, `inputs` and `sizes` are arguments that are right, as `namespace` has them.
`test_wrong_calls.py` makes the same calls, and asks of each error that it names the argument and comes from this
package on purpose.
"""

import argparse
import contextlib
import copy
import functools
import importlib
import io
import json
import linecache
import logging
import os
import re
import shlex
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

import dpo_kernels

TABLE = Path(__file__).resolve().with_suffix(".txt")
PACKAGE = Path(dpo_kernels.__file__).parent
PAIRS, LENGTH, HIDDEN, VOCAB = 2, 6, 8, 11
SHOWN = 200

# By group: calls, and what the message of each has to contain, the argument's name (or one of several: a|b).
CALLS = {
    "linear_dpo_loss": [
        ("linear_dpo_loss(hidden, weight, labels)", "ref_logps"),
        ("linear_dpo_loss(hidden, weight, labels, None)", "ref_logps"),
        ("linear_dpo_loss(None, weight, labels, ref_logps)", "hidden"),
        ("linear_dpo_loss(hidden, None, labels, ref_logps)", "weight"),
        ("linear_dpo_loss(hidden, weight, None, ref_logps)", "labels"),
        ("linear_dpo_loss(weight, hidden, labels, ref_logps)", "hidden"),
        ("linear_dpo_loss(hidden, labels, weight, ref_logps)", "labels"),
        ("linear_dpo_loss(hidden, weight, ref_logps, labels)", "labels"),
        ("linear_dpo_loss(logits, weight, labels, ref_logps)", "weight"),
        ("linear_dpo_loss(hidden, weight.t(), labels, ref_logps)", "weight"),
        ("linear_dpo_loss(hidden, layer, labels, ref_logps)", "weight"),
        ("linear_dpo_loss(*given, bias)", "positional"),
        ("linear_dpo_loss(*given, 0.1)", "positional"),
        ("linear_dpo_loss(hidden.numpy(), weight, labels, ref_logps)", "hidden"),
        ("linear_dpo_loss(hidden.tolist(), weight, labels, ref_logps)", "hidden"),
        ("linear_dpo_loss((hidden, None), weight, labels, ref_logps)", "hidden"),
        ("linear_dpo_loss(hidden, weight, labels, ref_logps.tolist())", "ref_logps"),
        ("linear_dpo_loss(hidden, weight, labels, 0.0)", "ref_logps"),
        ("linear_dpo_loss(hidden, weight, labels, (ref_logps[:2], ref_logps[2:]))", "ref_logps"),
        ("linear_dpo_loss(hidden, weight, labels, ref_logps[:2])", "ref_logps"),
        ("linear_dpo_loss(hidden, weight, labels, ref_logps[:, None])", "ref_logps"),
        ("linear_dpo_loss(hidden, weight, labels, ref_logps.long())", "ref_logps"),
        ("linear_dpo_loss(hidden, weight, labels, ref_logps.to('meta'))", "ref_logps"),
        ("linear_dpo_loss(hidden, weight, labels, filled(ref_logps, nan))", "ref_logps"),
        ("linear_dpo_loss(hidden, weight, labels, filled(ref_logps, -inf))", "ref_logps"),
        ("linear_dpo_loss(hidden.int(), weight.int(), labels, ref_logps)", "hidden"),
        ("linear_dpo_loss(hidden.bfloat16(), weight, labels, ref_logps)", "weight"),
        ("linear_dpo_loss(hidden[0], weight, labels[0], ref_logps)", "hidden"),
        ("linear_dpo_loss(hidden.flatten(0, 1), weight, labels.flatten(), ref_logps)", "hidden"),
        ("linear_dpo_loss(hidden[:, :-1], weight, labels, ref_logps)", "labels"),
        ("linear_dpo_loss(hidden[:3], weight, labels[:3], ref_logps[:3])", "hidden"),
        ("linear_dpo_loss(hidden[:0], weight, labels[:0], ref_logps[:0])", "hidden"),
        ("linear_dpo_loss(hidden, weight[:0], labels, ref_logps)", "weight"),
        ("linear_dpo_loss(hidden[..., :0], weight[:, :0], labels, ref_logps)", "hidden"),
        ("linear_dpo_loss(hidden, weight, labels.float(), ref_logps)", "labels"),
        ("linear_dpo_loss(hidden, weight, labels > 3, ref_logps)", "labels"),
        ("linear_dpo_loss(hidden, weight, labels + VOCAB, ref_logps)", "labels"),
        ("linear_dpo_loss(hidden, weight, labels.masked_fill(labels < 0, -1), ref_logps)", "labels"),
        ("linear_dpo_loss(*given, ignore_index=0)", "labels"),
        ("linear_dpo_loss(*given, ignore_index=None)", "ignore_index"),
        ("linear_dpo_loss(*given, ignore_index=-100.0)", "ignore_index"),
        ("linear_dpo_loss(*given, shift='yes')", "shift"),
        ("linear_dpo_loss(hidden, weight, labels.to('meta'), ref_logps)", "labels"),
        ("linear_dpo_loss(hidden, weight.to('meta'), labels, ref_logps)", "weight"),
        ("linear_dpo_loss(filled(hidden, nan), weight, labels, ref_logps)", "hidden"),
        ("linear_dpo_loss(hidden, filled(weight, inf), labels, ref_logps)", "weight"),
        ("linear_dpo_loss(hidden, filled(weight, nan).requires_grad_(), labels, ref_logps)", "weight"),
        ("linear_dpo_loss(*given, bias=filled(bias, nan))", "bias"),
        ("linear_dpo_loss(*given, bias=True)", "bias"),
        ("linear_dpo_loss(*given, bias=bias[:-1])", "bias"),
        ("linear_dpo_loss(*given, betta=0.1)", "betta"),
        ("linear_dpo_loss(*given, reference_free=True)", "reference_free"),
        ("linear_dpo_loss(*given, average_log_prob=True)", "average_log_prob"),
        ("linear_dpo_loss(*given, reduction='mean')", "reduction"),
        ("linear_dpo_loss(*given, label_pad_token_id=-100)", "label_pad_token_id"),
        ("linear_dpo_loss(*given, f_divergence_type='js')", "f_divergence_type"),
        ("linear_dpo_loss(*given, reference_logps=ref_logps)", "reference_logps"),
        ("linear_dpo_loss(*given, attention_mask=labels)", "attention_mask"),
        ("linear_dpo_loss(*given, ref_hidden=hidden)", "ref_hidden"),
        ("linear_dpo_loss(_input=hidden, lin_weight=weight, target=labels, ref_logps=ref_logps)", "_input"),
        ("linear_dpo_loss(*given, beta=0)", "beta"),
        ("linear_dpo_loss(*given, beta=True)", "beta"),
        ("linear_dpo_loss(*given, beta='0.1')", "beta"),
        ("linear_dpo_loss(*given, beta=nan)", "beta"),
        ("linear_dpo_loss(*given, beta=torch.tensor(0.1))", "beta"),
        ("linear_dpo_loss(*given, beta=None)", "beta"),
        ("linear_dpo_loss(*given, loss_type='dpo')", "loss_type"),
        ("linear_dpo_loss(*given, loss_type='simpo')", "loss_type"),
        ("linear_dpo_loss(*given, loss_type=None)", "loss_type"),
        ("linear_dpo_loss(*given, loss_type=['sigmoid', 3])", "loss_type"),
        ("linear_dpo_loss(*given, loss_weights=0.5)", "loss_weights"),
        ("linear_dpo_loss(*given, loss_type=['sigmoid', 'sft'], loss_weights=[1.0])", "loss_weights"),
        ("linear_dpo_loss(*given, label_smoothing=0.1)", "label_smoothing"),
        ("linear_dpo_loss(*given, rpo_alpha=-1.0)", "rpo_alpha"),
        ("linear_dpo_loss(*given, ld_alpha=2)", "ld_alpha"),
        ("linear_dpo_loss(*given, ld_alpha=True)", "ld_alpha"),
        ("linear_dpo_loss(*given, use_weighting='no')", "use_weighting"),
        ("linear_dpo_loss(*given, softcap=0)", "softcap"),
        ("linear_dpo_loss(*given, temperature=0)", "temperature"),
        ("linear_dpo_loss(*given, temperature=torch.tensor(1.0))", "temperature"),
        ("linear_dpo_loss(*given, logit_scale='1')", "logit_scale"),
        ("linear_dpo_loss(*given, token_weights=-ones)", "token_weights"),
        ("linear_dpo_loss(*given, token_weights=ones[:, 1:])", "token_weights"),
        ("linear_dpo_loss(*given, token_weights=ones.tolist())", "token_weights"),
        ("linear_dpo_loss(*given, pairs=[(0, 4)])", "pairs"),
        ("linear_dpo_loss(*given, pairs=[0, 1])", "pairs"),
        ("linear_dpo_loss(*given, pairs=[(0, 1)])", "pairs"),
        ("linear_dpo_loss(*given, pairs=[(0, 1), (2, 2)])", "pairs"),
        ("linear_dpo_loss(*given, pairs=ref_logps)", "pairs"),
        ("linear_dpo_loss(*given, pairs=[(0, 1), (0, 2), (0, 3)], ld_alpha=0.5)", "ld_alpha"),
        ("linear_dpo_loss(*given, loss_type=('plackett_luce', 'sft'))", "loss_type"),
        ("linear_dpo_loss(*given, predictors=labels[:, :2])", "predictors"),
        ("linear_dpo_loss(*given, predictors=labels + 99)", "predictors"),
        ("linear_dpo_loss(*given, predictors=labels.int())", "predictors"),
        ("linear_dpo_loss(*given, predictors=labels * 0, shift=True)", "shift"),
        ("linear_dpo_loss(*given, pair_weights=torch.ones(4))", "pair_weights"),
        ("linear_dpo_loss(*given, pair_weights=-torch.ones(2))", "pair_weights"),
        ("linear_dpo_loss(*given, pair_weights=[1.0, 2.0])", "pair_weights"),
        ("linear_dpo_loss(*given, pair_weights=torch.ones(2).requires_grad_())", "pair_weights"),
        ("linear_dpo_loss(*given, lengths=torch.ones(2))", "lengths"),
        ("linear_dpo_loss(*given, loss_type='sft', mean_chosen_length=-1.0)", "mean_chosen_length"),
        ("linear_dpo_loss(*given, loss_type='sft', mean_chosen_length=torch.tensor(-1.0))", "mean_chosen_length"),
        ("linear_dpo_loss(*given, differentiable='logps')", "differentiable"),
        ("linear_dpo_loss(*given, differentiable=('loss',))", "differentiable"),
        ("linear_dpo_loss(*given, differentiable=True)", "differentiable"),
        ("linear_dpo_loss(*given, differentiable=None)", "differentiable"),
        ("linear_dpo_loss(*given, stats='entropy')", "stats"),
        ("linear_dpo_loss(*given, stats=['accuracy'])", "stats"),
        ("linear_dpo_loss(*given, num_labelled=labels.sum())", "num_labelled"),
        ("linear_dpo_loss(*given, num_labelled=3)", "num_labelled"),
        ("linear_dpo_loss(*given, chunk_bytes=-1)", "chunk_bytes"),
        ("linear_dpo_loss(*given, chunk_bytes='1GiB')", "chunk_bytes"),
        ("linear_dpo_loss(*given, chunk_bytes=nan)", "chunk_bytes"),
        ("linear_dpo_loss(*given, chunk_bytes=True)", "chunk_bytes"),
        ("linear_dpo_loss(*given, impl='gpu')", "impl"),
        ("linear_dpo_loss(*given, impl='cuda')", "impl"),
        ("linear_dpo_loss(*given, impl=None)", "impl"),
    ],
    "gradients": [
        (
            "linear_dpo_loss(hidden, weight.requires_grad_(), labels, ref_logps).logps.sum().backward()",
            "differentiable",
        ),
        (
            "linear_dpo_loss(hidden, weight.requires_grad_(), labels, ref_logps).losses.mean().backward()",
            "differentiable",
        ),
        (
            "linear_dpo_loss(hidden.requires_grad_(), weight, labels, ref_logps).chosen_rewards.mean().backward()",
            "grad",
        ),
        ("twice(linear_dpo_loss(hidden, weight.requires_grad_(), labels, ref_logps).loss)", "chunk_bytes"),
        (
            "with_graph(linear_dpo_loss(hidden, weight.requires_grad_(), labels, ref_logps).loss, weight)",
            "linear_dpo_loss|derivative",
        ),
        (
            "with_graph(linear_sequence_logps(hidden.requires_grad_(), weight, labels).logps.sum(), hidden)",
            "derivative",
        ),
        ("with_graph(sequence_logps(logits.requires_grad_(), labels).logps.sum(), logits)", "derivative"),
        ("torch.func.grad(lambda h: linear_dpo_loss(h, weight, labels, ref_logps).loss)(hidden)", "torch.func"),
        ("torch.func.grad(lambda w: linear_dpo_loss(hidden, w, labels, ref_logps).loss)(weight)", "torch.func"),
        (
            "torch.func.vmap(lambda r: linear_dpo_loss(hidden, weight, labels, r).loss)(ref_logps.expand(3, 4))",
            "torch.func",
        ),
        (
            "torch.func.vmap(lambda x: linear_sequence_logps(hidden, weight, x).logps)(labels.expand(3, 4, 6))",
            "torch.func",
        ),
        ("torch.func.grad(lambda h: linear_sequence_logps(h, weight, labels).logps.sum())(hidden)", "torch.func"),
        ("torch.func.vmap(lambda x: sequence_logps(x[None], labels[:1]).logps)(logits)", "torch.func"),
        ("torch.func.jacrev(lambda x: sequence_logps(x, labels).logps)(logits)", "torch.func"),
        (
            "torch.func.jvp(lambda h: linear_sequence_logps(h, weight, labels).logps, (hidden,), (hidden,))",
            "torch.func",
        ),
    ],
    "linear_sequence_logps": [
        ("linear_sequence_logps(hidden, weight)", "labels"),
        ("linear_sequence_logps(hidden, weight, labels, sequence_group='cp')", "sequence_group"),
        ("linear_dpo_loss(hidden, weight, labels, ref_logps, sequence_group=[0, 1])", "sequence_group"),
        ("linear_sequence_logps(hidden, labels)", "labels"),
        ("linear_sequence_logps(hidden, labels, weight)", "labels"),
        ("linear_sequence_logps(hidden, weight, labels, ref_logps)", "positional"),
        ("linear_sequence_logps((hidden,), weight, labels)", "hidden"),
        ("linear_sequence_logps(hidden, weight, labels.tolist())", "labels"),
        ("linear_sequence_logps(hidden, weight, labels[:, 1:])", "labels"),
        ("linear_sequence_logps(hidden, weight, labels - VOCAB)", "labels"),
        ("linear_sequence_logps(hidden.half(), weight, labels)", "weight"),
        ("linear_sequence_logps(hidden, weight, labels, bias=bias.double())", "bias"),
        ("linear_sequence_logps(hidden, weight, labels, bias=filled(bias, inf))", "bias"),
        ("linear_sequence_logps(filled(hidden, inf), weight, labels)", "hidden"),
        ("linear_sequence_logps(hidden, filled(weight, nan), labels)", "weight"),
        ("linear_sequence_logps(hidden, weight, labels, reduction='none')", "reduction"),
        ("linear_sequence_logps(hidden, weight, labels, reduction=None)", "reduction"),
        ("linear_sequence_logps(hidden, weight, labels, average_log_prob=True)", "average_log_prob"),
        ("linear_sequence_logps(hidden, weight, labels, beta=0.1)", "beta"),
        ("linear_sequence_logps(hidden, weight, labels, temprature=0.7)", "temprature"),
        ("linear_sequence_logps(hidden, weight, labels, temperature=-1)", "temperature"),
        ("linear_sequence_logps(hidden, weight, labels, softcap='30')", "softcap"),
        ("linear_sequence_logps(hidden, weight, labels, token_weights=ones[0])", "token_weights"),
        ("linear_sequence_logps(hidden, weight, labels, token_weights=ones.to('meta'))", "token_weights"),
        ("linear_sequence_logps(hidden, weight, labels, token_weights=filled(ones, nan))", "token_weights"),
        ("linear_sequence_logps(hidden, weight, labels, token_weights=torch.complex(ones, ones))", "token_weights"),
        ("linear_sequence_logps(hidden, weight, labels, stats={'entropy'})", "stats"),
        ("linear_sequence_logps(hidden, weight, labels, stats=None)", "stats"),
        ("linear_sequence_logps(hidden, weight, labels, stats=[['entropy']])", "stats"),
        ("linear_sequence_logps(hidden, weight, labels, num_labelled=-1)", "num_labelled"),
        ("linear_sequence_logps(hidden, weight, labels, ignore_index='-100')", "ignore_index"),
        ("linear_sequence_logps(hidden, weight, labels, ignore_index=-100.5)", "ignore_index"),
        ("linear_sequence_logps(hidden, weight, labels, shift=None)", "shift"),
        ("linear_sequence_logps(hidden, weight, labels, check_hidden='no')", "check_hidden"),
        ("linear_sequence_logps(hidden, weight, labels, impl='Triton')", "impl"),
        ("linear_sequence_logps(hidden, weight, labels, impl=['torch'])", "impl"),
    ],
    "sequence_logps": [
        ("sequence_logps(logits)", "labels"),
        ("sequence_logps(hidden, weight, labels)", "positional"),
        ("sequence_logps(hidden, labels)", "labels"),
        ("sequence_logps(labels, logits)", "logits"),
        ("sequence_logps(output, labels)", "logits"),
        ("sequence_logps(logits.numpy(), labels)", "logits"),
        ("sequence_logps(logits[0], labels[0])", "logits"),
        ("sequence_logps(logits.long(), labels)", "logits"),
        ("sequence_logps(logits[:, :-1], labels)", "labels"),
        ("sequence_logps(logits, labels.float())", "labels"),
        ("sequence_logps(logits, labels * 100)", "labels"),
        ("sequence_logps(logits[..., :0], labels)", "logits"),
        ("sequence_logps(logits, labels.to('meta'))", "labels"),
        ("sequence_logps(logits, labels, reduction='batchmean')", "reduction"),
        ("sequence_logps(logits, labels, temperature=0.7)", "temperature"),
        ("sequence_logps(logits, labels, label_pad_token_id=0)", "label_pad_token_id"),
        ("sequence_logps(logits, labels, bias=bias)", "bias"),
        ("sequence_logps(logits[:, :1].expand(4, 6, 11), labels, inplace_backward=True)", "inplace_backward"),
        ("sequence_logps(logits, labels, impl='gpu')", "impl"),
    ],
    "dpo_loss": [
        ("dpo_loss(chosen, rejected)", "ref_chosen_logps"),
        ("dpo_loss(chosen, rejected, None, None)", "ref_chosen_logps"),
        ("dpo_loss(chosen, rejected, 0.0, 0.0)", "ref_chosen_logps"),
        ("dpo_loss(*pairs, 0.1)", "positional"),
        ("dpo_loss(chosen.numpy(), rejected, ref_chosen, ref_rejected)", "chosen_logps"),
        ("dpo_loss(chosen.tolist(), rejected.tolist(), ref_chosen.tolist(), ref_rejected.tolist())", "logps"),
        ("dpo_loss(chosen.long(), rejected, ref_chosen, ref_rejected)", "chosen_logps"),
        ("dpo_loss(chosen[:1], rejected, ref_chosen, ref_rejected)", "rejected_logps"),
        ("dpo_loss(chosen[0], rejected[0], ref_chosen[0], ref_rejected[0])", "chosen_logps"),
        ("dpo_loss(chosen[:, None], rejected[:, None], ref_chosen[:, None], ref_rejected[:, None])", "chosen_logps"),
        ("dpo_loss(chosen, rejected, ref_chosen.to('meta'), ref_rejected)", "ref_chosen_logps"),
        ("dpo_loss(chosen, rejected, filled(ref_chosen, nan), ref_rejected)", "ref_chosen_logps"),
        ("dpo_loss(chosen, rejected, ref_chosen, filled(ref_rejected, -inf))", "ref_rejected_logps"),
        ("dpo_loss(*pairs, loss_type='ipo')", "chosen_lengths"),
        ("dpo_loss(*pairs, loss_type='sft')", "chosen_lengths"),
        ("dpo_loss(*pairs, rpo_alpha=1.0)", "chosen_lengths"),
        ("dpo_loss(*pairs, loss_type='exo_pair')", "label_smoothing"),
        ("dpo_loss(*pairs, loss_type='robust', label_smoothing=0.5)", "label_smoothing"),
        ("dpo_loss(*pairs, loss_type='sigmiod')", "loss_type"),
        ("dpo_loss(*pairs, loss_type={'sigmoid': 1.0})", "loss_type"),
        ("dpo_loss(*pairs, loss_weights=['1'])", "loss_weights"),
        ("dpo_loss(*pairs, f_divergence='kl')", "f_divergence"),
        ("dpo_loss(*pairs, f_divergence=['js'])", "f_divergence"),
        ("dpo_loss(*pairs, f_divergence='js', loss_type='apo_zero')", "f_divergence"),
        ("dpo_loss(*pairs, f_alpha='0.5')", "f_alpha"),
        ("dpo_loss(*pairs, discopop_tau=0)", "discopop_tau"),
        ("dpo_loss(*pairs, tau=0.05)", "tau"),
        ("dpo_loss(*pairs, ld_alpha=0.5)", "ld_alpha"),
        ("dpo_loss(*pairs, reference_free=True)", "reference_free"),
        (
            "dpo_loss(policy_chosen_logps=chosen, policy_rejected_logps=rejected, beta=0.1)",
            "policy_chosen_logps",
        ),
        ("dpo_loss(*pairs, pair_weights=-torch.ones(2))", "pair_weights"),
        ("dpo_loss(*pairs, pair_weights=[1.0, 1.0])", "pair_weights"),
        ("dpo_loss(*pairs, pair_weights=filled(torch.ones(2), nan))", "pair_weights"),
        ("dpo_loss(*pairs, loss_type='ipo', chosen_lengths=-lengths, rejected_lengths=lengths)", "chosen_lengths"),
        ("dpo_loss(*pairs, loss_type='ipo', chosen_lengths=3, rejected_lengths=4)", "chosen_lengths"),
        ("dpo_loss(*pairs, mean_chosen_length=torch.ones(2), loss_type='sft')", "mean_chosen_length"),
        ("dpo_loss(*pairs, mean_chosen_length='3', loss_type='sft')", "mean_chosen_length"),
    ],
    "losses without a reference": [
        ("simpo_loss(chosen, rejected)", "chosen_lengths"),
        ("simpo_loss(chosen, rejected, lengths, lengths)", "positional"),
        ("simpo_loss(chosen, rejected, chosen_lengths=None, rejected_lengths=None)", "chosen_lengths"),
        ("simpo_loss(chosen, rejected, chosen_lengths=3, rejected_lengths=3)", "chosen_lengths"),
        ("simpo_loss(chosen, rejected, chosen_lengths=True, rejected_lengths=True)", "chosen_lengths"),
        ("simpo_loss(chosen, rejected, chosen_lengths=[3, 4], rejected_lengths=[3, 4])", "chosen_lengths"),
        ("simpo_loss(chosen, rejected, chosen_lengths=lengths[:1], rejected_lengths=lengths)", "chosen_lengths"),
        ("simpo_loss(chosen, rejected, **both, gamma_beta_ratio=0.5)", "gamma_beta_ratio"),
        ("simpo_loss(chosen, rejected, **both, simpo_gamma=0.5)", "simpo_gamma"),
        ("simpo_loss(chosen, rejected, **both, gamma=None)", "gamma"),
        ("simpo_loss(chosen, rejected, **both, beta=-2)", "beta"),
        ("simpo_loss(chosen, None, **both)", "rejected_logps"),
        ("orpo_loss(chosen, rejected)", "chosen_lengths"),
        ("orpo_loss(chosen, rejected, chosen_lengths=1.5, rejected_lengths=1)", "chosen_lengths"),
        ("orpo_loss(chosen, rejected, **both, alpha=1.0)", "alpha"),
        ("orpo_loss(chosen, rejected, **both, lambda_=1.0)", "lambda_"),
        ("orpo_loss(filled(chosen, nan).tolist(), rejected, chosen_lengths=1, rejected_lengths=1)", "chosen_logps"),
        ("cpo_loss(chosen)", "rejected_logps"),
        ("cpo_loss(chosen, rejected, loss_type='simpo')", "loss_type"),
        ("cpo_loss(chosen, rejected, loss_type=['sigmoid'])", "loss_type"),
        ("cpo_loss(chosen, rejected, loss_type='ipo')", "chosen_lengths"),
        ("cpo_loss(chosen, rejected, loss_type='hinge', label_smoothing=0.1)", "label_smoothing"),
        ("cpo_loss(chosen, rejected, cpo_alpha=-1)", "cpo_alpha"),
        ("cpo_loss(chosen, rejected, rejected_lengths='3')", "rejected_lengths"),
        ("cpo_loss(chosen, rejected, mean_chosen_length=True)", "mean_chosen_length"),
        ("cpo_loss(chosen, rejected, ref_chosen, ref_rejected)", "positional"),
    ],
    "rankings": [
        ("plackett_luce_loss(ref_logps)", "ref_logps"),
        ("plackett_luce_loss(ref_logps, None)", "ref_logps"),
        ("plackett_luce_loss(ref_logps, ref_logps[:2])", "ref_logps"),
        ("plackett_luce_loss(ref_logps.tolist(), ref_logps)", "logps"),
        ("plackett_luce_loss(labels[0], ref_logps)", "logps"),
        ("plackett_luce_loss(ref_logps[:3], ref_logps[:3])", "logps"),
        ("plackett_luce_loss(ref_logps, ref_logps, [(0, 1)])", "pairs"),
        ("plackett_luce_loss(ref_logps, ref_logps, [[0, 1, 2, 3]])", "pairs"),
        ("plackett_luce_loss(ref_logps, ref_logps, beta=0)", "beta"),
        ("plackett_luce_loss(ref_logps, filled(ref_logps, nan))", "ref_logps"),
        ("plackett_luce_loss(ref_logps, ref_logps, ranks=[0, 1])", "ranks"),
        ("group_rankings(None)", "pairs"),
        ("group_rankings(dataset)", "pairs"),
    ],
    "layouts": [
        ("use_layouts(None)", "model"),
        ("use_layouts(layer)", "model"),
        ("laid_out(3).__enter__()", "layout"),
        ("laid_out(mask[:, None, :, None]).__enter__()", "layout"),
        ("hidden_of_responses(None, ids)", "hidden"),
        ("hidden_of_responses(hidden, None)", "predictors"),
        ("hidden_of_responses(hidden, ids + 99)", "predictors"),
        ("measured_batching('packed', 4, 64)", "batching"),
    ],
    "kto": [
        ("kto_loss(chosen, ref_chosen, good)", "kl"),
        ("kto_loss(chosen, ref_chosen)", "labels"),
        ("kto_loss(chosen, None, good, kl=0.0)", "ref_logps"),
        ("kto_loss(chosen, good, ref_chosen, kl=0.0)", "ref_logps"),
        ("kto_loss(chosen, ref_chosen, good.long(), kl=0.0)", "labels"),
        ("kto_loss(chosen, ref_chosen, [True, False], kl=0.0)", "labels"),
        ("kto_loss(chosen, ref_chosen, good[:1], kl=0.0)", "labels"),
        ("kto_loss(chosen, ref_chosen, good.to('meta'), kl=0.0)", "labels"),
        ("kto_loss(chosen, ref_chosen, good, kl=chosen)", "kl"),
        ("kto_loss(chosen, ref_chosen, good, kl='0')", "kl"),
        ("kto_loss(chosen, ref_chosen, good, kl=True)", "kl"),
        ("kto_loss(chosen, ref_chosen, good, kl=nan)", "kl"),
        ("kto_loss(chosen, ref_chosen, good, kl=0.0, loss_type='apo_zero_unpaired')", "kl"),
        ("kto_loss(chosen, ref_chosen, good, kl=0.0, loss_type='bco')", "loss_type"),
        ("kto_loss(chosen, filled(ref_chosen, -inf), good, kl=0.0)", "ref_logps"),
        ("kto_loss(chosen, ref_chosen, good, kl=0.0, desirable_weight=-1)", "desirable_weight"),
        ("kto_loss(chosen, ref_chosen, good, kl=0.0, undesirable_weight=torch.tensor(1.0))", "undesirable_weight"),
        ("kto_loss(chosen, ref_chosen, good, kl=0.0, lambda_d=1.0)", "lambda_d"),
        ("kto_kl(chosen)", "ref_kl_logps"),
        ("kto_kl(chosen, None)", "ref_kl_logps"),
        ("kto_kl(chosen, ref_chosen[:1])", "ref_kl_logps"),
        ("kto_kl(chosen.numpy(), ref_chosen.numpy())", "kl_logps"),
        ("kto_kl(chosen, filled(ref_chosen, nan))", "ref_kl_logps"),
    ],
    "modules": [
        ("DPOLoss(0.1)", "positional"),
        ("DPOLoss(betta=0.1)", "betta"),
        ("DPOLoss(beta='0.1')", "beta"),
        ("DPOLoss(reference_free=True)", "reference_free"),
        ("DPOLoss(loss_type='dpo')", "loss_type"),
        ("DPOLoss(ld_alpha=0.5)", "ld_alpha"),
        ("DPOLoss()(chosen, rejected)", "ref_chosen_logps"),
        ("DPOLoss()(chosen, rejected, None, None)", "ref_chosen_logps"),
        ("DPOLoss()(chosen, rejected, ref_chosen, ref_rejected, beta=0.1)", "beta"),
        ("DPOLoss(loss_type='ipo')(chosen, rejected, ref_chosen, ref_rejected)", "chosen_lengths"),
        ("LinearDPOLoss(label_smoothing=0.7)", "label_smoothing"),
        ("LinearDPOLoss(weight)", "positional"),
        ("LinearDPOLoss(HIDDEN, VOCAB)", "positional"),
        ("LinearDPOLoss(reduction='mean')", "reduction"),
        ("LinearDPOLoss(temperature=0)", "temperature"),
        ("LinearDPOLoss(softcap=-1)", "softcap"),
        ("LinearDPOLoss(impl='gpu')", "impl"),
        ("LinearDPOLoss(chunk_bytes=-1)", "chunk_bytes"),
        ("LinearDPOLoss(use_weighting=True, loss_type='aot')", "use_weighting|loss_type"),
        ("LinearDPOLoss()(hidden, weight, labels)", "ref_logps"),
        ("LinearDPOLoss()(weight, hidden, labels, ref_logps)", "hidden"),
        ("LinearDPOLoss()(hidden, weight, labels, bias, ref_logps)", "ref_logps|bias"),
        ("LinearDPOLoss()(hidden, weight, labels, ref_logps, beta=0.2)", "beta"),
    ],
    "LMHead": [
        ("LMHead.from_model(None)", "model"),
        ("LMHead.from_model('gpt2')", "model"),
        ("LMHead.from_model(layer)", "model"),
        ("LMHead.from_model(model.model)", "model"),
        ("LMHead.from_model(model.lm_head)", "model"),
        ("LMHead.from_model(model, verify=False)", "verify"),
        ("LMHead.from_model(model, False)", "positional"),
        ("LMHead.from_model(model, check='no')", "check"),
        ("LMHead(None)", "model"),
        ("head.hidden_states()", "input_ids"),
        ("head.hidden_states(None)", "input_ids"),
        ("head.hidden_states(ids.tolist())", "input_ids"),
        ("head.hidden_states(ids.numpy())", "input_ids"),
        ("head.hidden_states(batch)", "input_ids"),
        ("head.hidden_states('Hello')", "input_ids"),
        ("head.hidden_states(ids.float())", "input_ids"),
        ("head.hidden_states(ids[0])", "input_ids"),
        ("head.hidden_states(ids + 10**6)", "input_ids"),
        ("head.hidden_states(ids, mask)", "positional"),
        ("head.hidden_states(ids, labels=ids)", "labels"),
        ("head.hidden_states(ids, attn_mask=mask)", "attn_mask"),
        ("head.sequence_logps(head.hidden_states(ids), ids)", "hidden"),
        ("head.sequence_logps(ids, ids)", "hidden"),
        ("head.sequence_logps(model(ids).logits, ids)", "hidden"),
        ("head.sequence_logps(model(ids), ids)", "hidden"),
        ("head.sequence_logps(model_hidden, weight, ids)", "positional"),
        ("head.sequence_logps(model_hidden)", "labels"),
        ("head.sequence_logps(model_hidden, None)", "labels"),
        ("head.sequence_logps(model_hidden, ids[:, 1:])", "labels"),
        ("head.sequence_logps(model_hidden, ids, average_log_prob=True)", "average_log_prob"),
        ("head.sequence_logps(model_hidden, ids, bias=None)", "bias"),
        ("head.sequence_logps(model_hidden[..., :5], ids)", "hidden"),
        ("head.sequence_logps(model_hidden.to('meta'), ids)", "labels|hidden"),
        ("head.dpo_loss(model_hidden, ids)", "ref_logps"),
        ("head.dpo_loss(model_hidden, ids, None)", "ref_logps"),
        ("head.dpo_loss(model_hidden, ref_logps, ids)", "labels"),
        ("head.dpo_loss(head.hidden_states(ids), ids, ref_logps)", "hidden"),
        ("head.dpo_loss(model_hidden, ids, head.sequence_logps(model_hidden, ids))", "ref_logps"),
        ("head.dpo_loss(model_hidden, ids, ref_logps[:2])", "ref_logps"),
        ("head.dpo_loss(model_hidden, ids, ref_logps, betta=1)", "betta"),
        ("head.dpo_loss(model_hidden, ids, ref_logps, reference_free=True)", "reference_free"),
        ("head.dpo_loss(model_hidden, ids, ref_logps, loss_type='orpo')", "loss_type"),
        ("head.operands(None)", "hidden"),
        ("head.operands(head.hidden_states(ids))", "hidden"),
        ("head.operands(ids)", "hidden"),
        ("head.operands(model_hidden[..., :5])", "hidden"),
        ("head.operands()", "hidden"),
    ],
    "add_fused_lm_head": [
        ("add_fused_lm_head(None)", "model"),
        ("add_fused_lm_head(layer)", "model"),
        ("add_fused_lm_head(model.model)", "model"),
        ("add_fused_lm_head(model, 'log_probs')", "outputs"),
        ("add_fused_lm_head(model, ['logits'])", "outputs"),
        ("add_fused_lm_head(model, None)", "outputs"),
        ("add_fused_lm_head(model, output=['entropy'])", "output"),
        ("fused(ids, fused_lm_head=True)", "labels"),
        ("fused(input_ids=ids, fused_lm_head=True)", "labels"),
        ("fused(ids, labels=ids, fused_lm_head=True)", "fused_lm_head"),
        ("fused(input_ids=ids, labels=ids.tolist(), fused_lm_head=True)", "labels"),
        ("fused(input_ids=ids, labels=ids[0], fused_lm_head=True)", "labels"),
        ("fused(input_ids=ids, labels=ids[:, 1:], fused_lm_head=True)", "labels"),
        ("fused(input_ids=ids, labels=ids.float(), fused_lm_head=True)", "labels"),
        ("fused(input_ids=ids, labels=ids + 10**6, fused_lm_head=True)", "labels"),
        ("fused(labels=ids, fused_lm_head=True)", "input_ids"),
        ("fused(**inputs, outputs='entropy', fused_lm_head=True)", "outputs"),
        ("fused(**inputs, outputs=['logits'], fused_lm_head=True)", "outputs"),
        ("fused(**inputs, preference=ref_logps, fused_lm_head=True)", "preference"),
        ("fused(**inputs, preference=Preference, fused_lm_head=True)", "preference"),
        ("fused(**inputs, preference=Preference(ref_logps[:2]), fused_lm_head=True)", "ref_logps"),
        (
            "fused(input_ids=ids[:3], labels=ids[:3], preference=Preference(ref_logps[:3]), fused_lm_head=True)",
            "hidden|labels|sequences",
        ),
        (
            "fused(**inputs, preference=Preference(ref_logps, token_weights=ones[:2]), fused_lm_head=True)",
            "token_weights",
        ),
        ("fused(**inputs, reference=True, fused_lm_head=True)", "reference"),
        ("fused(**inputs, reference=model, fused_lm_head=True)", "reference"),
        (
            "fused(**inputs, preference=Preference(ref_logps), reference=Reference.of(fused, {}), fused_lm_head=True)",
            "preference|reference",
        ),
        ("fused(**inputs, ref_logps=ref_logps, fused_lm_head=True)", "ref_logps"),
        ("fused(**inputs, beta=0.1, fused_lm_head=True)", "beta"),
        ("fused(**inputs, attn_mask=mask, fused_lm_head=True)", "attn_mask"),
        ("fused(**inputs, shift_labels=ids, fused_lm_head=True)", "shift_labels"),
        ("fused(**inputs, num_items_in_batch=0, fused_lm_head=True).loss", "num_items_in_batch"),
        ("fused(**inputs, num_items_in_batch=-3, fused_lm_head=True).loss", "num_items_in_batch"),
        ("fused(**inputs, num_items_in_batch='3', fused_lm_head=True).loss", "num_items_in_batch"),
        ("fused(**inputs, preference=Preference(ref_logps))", "fused_lm_head|preference"),
        ("fused(**inputs, fused_lm_head=True).logits", "logits"),
        ("fused(**inputs, fused_lm_head=True)['logits']", "logits"),
        ("Preference()", "ref_logps"),
        ("Preference(None)", "ref_logps"),
        ("Preference(ref_logps.tolist())", "ref_logps"),
        ("Preference(ref_logps.long())", "ref_logps"),
        ("Preference(ref_chosen, ref_rejected)", "positional"),
        ("Preference(ref_logps, 0.1)", "positional"),
        ("Preference(ref_logps, betta=0.1)", "betta"),
        ("Preference(ref_logps, beta=0)", "beta"),
        ("Preference(ref_logps, loss_type='dpo')", "loss_type"),
        ("Preference(ref_logps, shift=True)", "shift"),
        ("Preference(ref_logps, pair_weights=[1, 1])", "pair_weights"),
        ("Preference(ref_logps, temperature=0)", "temperature"),
        ("Preference(ref_logps, chunk_bytes=-1)", "chunk_bytes"),
        ("Preference(ref_logps, impl='gpu')", "impl"),
        ("Preference(ref_logps, differentiable='logps')", "differentiable"),
        ("Reference()", "gradients"),
        ("Reference(ref_logps, {})", "gradients"),
        ("Reference(['hidden'], None)", "options"),
        ("Reference.of(layer, {})", "policy"),
        ("Reference.of(None, {})", "policy"),
    ],
    "data": [
        ("load_preferences()", "name_or_path"),
        ("load_preferences(None)", "name_or_path"),
        ("load_preferences('')", "name_or_path"),
        ("load_preferences(42)", "name_or_path"),
        ("load_preferences([])", "name_or_path"),
        ("load_preferences({'prompt': ['a']})", "name_or_path"),
        ("load_preferences(rows)", "name_or_path"),
        ("load_preferences('no-such-file.jsonl')", "no-such-file.jsonl"),
        ("load_preferences(file('broken.jsonl', '{\"prompt\": '))", "broken.jsonl"),
        ("load_preferences(file('other.jsonl', '{\"text\": \"a\"}'))", "other.jsonl"),
        ("load_preferences(file('empty.jsonl', ''))", "empty.jsonl"),
        ("load_preferences(file('notes.pdf', 'text'))", "notes.pdf"),
        ("load_preferences(path, split='test')", "split"),
        ("load_preferences(path, split=None)", "split"),
        ("load_preferences(path, splits='train')", "splits"),
        ("load_preferences(path, max_rows=0)", "max_rows"),
        ("load_preferences(path, max_rows='10')", "max_rows"),
        ("load_preferences(path, max_rows=True)", "max_rows"),
        ("load_preferences(path, ranked_pairs='all')", "ranked_pairs"),
        ("load_preferences(path, empty_response='keep')", "empty_response"),
        ("load_preferences([path, path], weights=[1.0])", "weights"),
        ("load_preferences(path, weights=0.5)", "weights"),
        ("load_preferences([path, path], weights=[1.0, -1.0])", "weights"),
        ("load_preferences([path, path], weights='12')", "weights"),
        ("load_preferences([path, path], weights=[1.0, '2'])", "weights"),
        ("load_preferences(path, seed='a', weights=[0.5])", "seed"),
        ("load_preferences(path, name=3)", "name"),
        ("tokenize_preferences(tokenizer, dataset)", "dataset"),
        ("tokenize_preferences(dataset)", "tokenizer"),
        ("tokenize_preferences(dataset, None)", "tokenizer"),
        ("tokenize_preferences(dataset, 'gpt2')", "tokenizer"),
        ("tokenize_preferences(None, tokenizer)", "dataset"),
        ("tokenize_preferences(rows, tokenizer)", "dataset"),
        ("tokenize_preferences(path, tokenizer)", "dataset"),
        ("tokenize_preferences(dataset.remove_columns('prompt'), tokenizer)", "prompt"),
        ("tokenize_preferences(dataset, tokenizer, 512)", "positional"),
        ("tokenize_preferences(dataset, tokenizer, max_length=0)", "max_length"),
        ("tokenize_preferences(dataset, tokenizer, max_length='512')", "max_length"),
        ("tokenize_preferences(dataset, tokenizer, max_length=1)", "max_length"),
        ("tokenize_preferences(dataset, tokenizer, add_eos='no')", "add_eos"),
        ("tokenize_preferences(dataset, tokenizer, max_prompt_length=512)", "max_prompt_length"),
        ("tokenize_preferences(dataset, tokenizer, truncation=True)", "truncation"),
        ("tokenize_preferences(dataset, tokenizer, truncation='keep_start')", "truncation"),
        ("tokenize_preferences(dataset, tokenizer, train_on='first')", "train_on"),
        ("tokenize_preferences(dataset, tokenizer, chat_template_kwargs='x')", "chat_template_kwargs"),
        ("tokenize_preferences(dataset, tokenizer, num_proc=0)", "num_proc"),
        ("tokenize_preferences(dataset, tokenizer, num_proc='2')", "num_proc"),
        ("PairCollator()", "pad_token_id"),
        ("PairCollator(None)", "pad_token_id"),
        ("PairCollator(tokenizer)", "pad_token_id"),
        ("PairCollator(True)", "pad_token_id"),
        ("PairCollator(-1)", "pad_token_id"),
        ("PairCollator(0, pad_to_multiple_of=0)", "pad_to_multiple_of"),
        ("PairCollator(0, pad_to_multiple_of='8')", "pad_to_multiple_of"),
        ("PairCollator(0, ignore_index=0)", "ignore_index"),
        ("PairCollator(0, ignore_index=None)", "ignore_index"),
        ("PairCollator(0, label_pad_token_id=-100)", "label_pad_token_id"),
        ("PackedCollator()", "pad_token_id"),
        ("PackedCollator(None)", "pad_token_id"),
        ("PackedCollator(0, pad_to_multiple_of=0)", "pad_to_multiple_of"),
        ("PackedCollator(0, packed='yes')", "packed"),
        ("PackedCollator(0, shared_prefix=None)", "shared_prefix"),
        ("PackedCollator(0)([])", "pair"),
        ("PackedCollator(0)(rows)", "prompt_ids"),
        ("PairCollator(0)([])", "pair"),
        ("PairCollator(0)(None)", "examples"),
        ("PairCollator(0)(pair)", "examples"),
        ("PairCollator(0)(rows)", "prompt_ids"),
        ("PairCollator(0)([{**pair, 'chosen_ids': 'abc'}])", "chosen_ids"),
        ("PairCollator(0)([{**pair, 'chosen_ids': None}])", "chosen_ids"),
        ("PairCollator(0)([{**pair, 'chosen_ids': [1.5]}])", "chosen_ids"),
        ("PairCollator(0)([{**pair, 'chosen_ids': [-1]}])", "chosen_ids"),
        ("PairCollator(0)([{**pair, 'weight': -1.0}])", "weight"),
        ("PairCollator(0)([{**pair, 'weight': 'a'}])", "weight"),
        ("PairCollator(0)([pair, {**pair, 'weight': 1.0}])", "weight"),
        ("PairCollator(0)([{**pair, 'chosen_token_weights': [1.0]}])", "chosen_token_weights"),
        ("PairCollator(0)([{**pair, 'ref_chosen_logps': -1.0}])", "ref_rejected_logps"),
        ("PairCollator(0)([{**pair, 'ref_chosen_logps': None, 'ref_rejected_logps': None}])", "ref_chosen_logps"),
        ("demo_preferences(0)", "num_rows"),
        ("demo_preferences('10')", "num_rows"),
        ("demo_tokenizer('text', 10)", "vocab_size"),
        ("demo_model(300, hidden_size=30)", "hidden_size"),
    ],
    "training": [
        ("TrainConfig('demo', 'demo', 'demo', learning_rat=1)", "learning_rat"),
        ("TrainConfig(betta=0.1)", "betta"),
        ("TrainConfig(beta=0)", "beta"),
        ("TrainConfig(beta='strong')", "beta"),
        ("TrainConfig(beta=True)", "beta"),
        ("TrainConfig(beta=None)", "beta"),
        ("TrainConfig(beta=[0.1])", "beta"),
        ("TrainConfig(loss_type='dpo')", "loss_type"),
        ("TrainConfig(loss_type=['simpo', 'sft'])", "loss_type"),
        ("TrainConfig(loss_type='sigmoid', label_smoothing=0.1)", "label_smoothing"),
        ("TrainConfig(loss_weights=[1, 2])", "loss_weights"),
        ("TrainConfig(simpo_gamma=1.0)", "simpo_gamma"),
        ("TrainConfig(dtype='bf16')", "dtype"),
        ("TrainConfig(dtype=torch.bfloat16)", "dtype"),
        ("TrainConfig(model=None)", "model"),
        ("TrainConfig(model=layer)", "model"),
        ("TrainConfig(dataset=None)", "dataset"),
        ("TrainConfig(dataset=[])", "dataset"),
        ("TrainConfig(epochs=0)", "epochs"),
        ("TrainConfig(epochs=nan)", "epochs"),
        ("TrainConfig(max_steps=1.5)", "max_steps"),
        ("TrainConfig(learning_rate=-1)", "learning_rate"),
        ("TrainConfig(learning_rate='5e-7x')", "learning_rate"),
        ("TrainConfig(per_device_batch_size=0)", "per_device_batch_size"),
        ("TrainConfig(per_device_train_batch_size=4)", "per_device_train_batch_size"),
        ("TrainConfig(num_train_epochs=1)", "num_train_epochs"),
        ("TrainConfig(mixed_precision='fp8')", "mixed_precision"),
        ("TrainConfig(mixed_precision=True)", "mixed_precision"),
        ("TrainConfig(mixed_precision='fp16', dtype='bfloat16')", "mixed_precision"),
        ("TrainConfig(reference='adapter-free')", "reference"),
        ("TrainConfig(gradient_checkpointing='maybe')", "gradient_checkpointing"),
        ("TrainConfig(truncation='left')", "truncation"),
        ("TrainConfig(max_length=1)", "max_length"),
        ("TrainConfig(dataset_weights=[1, 2])", "dataset_weights"),
        ("TrainConfig(eval_fraction=1.0)", "eval_fraction"),
        ("TrainConfig(load_best_model_at_end=True, eval_fraction=0)", "load_best_model_at_end"),
        ("TrainConfig(chat_template_kwargs='x')", "chat_template_kwargs"),
        ("TrainConfig(impl='gpu')", "impl"),
        ("TrainConfig(seed=-1)", "seed"),
        ("train()", "config"),
        ("train(None)", "config"),
        ("train({'model': 'demo'})", "config"),
        ("train('config.yaml')", "config"),
        ("train(TrainConfig(), 3)", "positional"),
        ("train(model)", "config"),
        ("train(TrainConfig(dataset=path, model='no/such-model', output_dir=folder + '/a'))", "no/such-model"),
        ("train(TrainConfig(dataset='no-such.jsonl', output_dir=folder + '/a'))", "no-such.jsonl"),
        ("train(TrainConfig(dataset=path, output_dir=path))", "output_dir"),
        ("train(TrainConfig(dataset=path, output_dir=folder + '/a', resume='nowhere'))", "resume"),
        ("train(TrainConfig(dataset=path, output_dir=folder + '/a', chat_template='{% for'))", "chat_template"),
        ("train(TrainConfig(dataset=path, output_dir=folder + '/a', impl='cuda'))", "impl"),
    ],
    "planning": [
        ("Step()", "hidden"),
        ("Step(hidden=0, vocab=100, pairs=1, seq=8, labelled=0.5)", "hidden"),
        ("Step(hidden='64', vocab=100, pairs=1, seq=8, labelled=0.5)", "hidden"),
        ("Step(hidden=64, vocab=100, pairs=-1, seq=8, labelled=0.5)", "pairs"),
        ("Step(hidden=64, vocab=100, pairs=1, seq=8, labelled=50)", "labelled"),
        ("Step(**sizes, dtype='bfloat16')", "dtype"),
        ("Step(**sizes, device='cpu')", "device"),
        ("Step(**sizes, train='qlora')", "train"),
        ("Step(**sizes, reference='copy')", "reference"),
        ("Step(**sizes, shape='qwen2')", "shape"),
        ("Step(**sizes, chunk_bytes='1')", "chunk_bytes"),
        ("Step(**sizes, impl='gpu')", "impl"),
        ("Step(hidden=64, vocab=100, batch=1, seq=8, labelled=0.5)", "batch"),
        ("plan()", "step"),
        ("plan(step)", "memory"),
        ("plan(None, 10**9)", "step"),
        ("plan(step, '80GiB')", "memory"),
        ("plan(step, -1)", "memory"),
        ("footprint(step)", "way"),
        ("footprint(step, 'ours')", "way"),
        ("footprint(step, None)", "way"),
        ("footprint('TRL', step)", "step|way"),
        ("largest_batch(step, 'trl', 10**9)", "way"),
        ("largest_batch(step, 10**9)", "memory"),
        ("largest_batch(step, 'TRL', None)", "memory"),
    ],
    "trl": [
        ("trl_module.patch('DPO')", "DPO"),
        ("trl_module.patch('DPOtrainer')", "names"),
        ("trl_module.patch('GRPOTrainer')", "names"),
        ("trl_module.patch(['DPOTrainer'])", "names"),
        ("trl_module.patch(trl_module.DPOTrainer)", "names"),
        ("trl_module.patch(None)", "names"),
        ("trl_module.patch(trainers=['DPOTrainer'])", "trainers"),
        ("trl_module.is_patched('X')", "names"),
        ("trl_module.unpatch('DPOTrainer')", "positional"),
        ("trl_module.SimPOTrainer", "SimPOTrainer"),
        ("trl_module.DPOTrainer()", "model"),
        ("trl_trainer(betta=0.1)", "betta"),
        ("trl_trainer(loss_type=['dpo'])", "loss_type"),
        (
            "trl_module.DPOTrainer(model=model, args=trl_config(), train_dataset=trl_rows, tokenizer=tokenizer)",
            "tokenizer",
        ),
    ],
    "compat": [
        ("LigerFusedLinearDPOLoss(betta=0.1)", "betta"),
        ("LigerFusedLinearDPOLoss(beta=0)", "beta"),
        ("LigerFusedLinearDPOLoss(loss_type='dpo')", "loss_type"),
        ("LigerFusedLinearDPOLoss(ignore_index=None)(weight, hidden, labels, None, hidden, weight)", "ignore_index"),
        ("LigerFusedLinearDPOLoss()(weight, hidden, labels)", "ref_input"),
        ("LigerFusedLinearDPOLoss()(hidden, weight, labels, None, hidden, weight)", "_input"),
        ("LigerFusedLinearDPOLoss()(weight, hidden, labels, None, hidden)", "ref_weight"),
        ("LigerFusedLinearDPOLoss()(weight, hidden, labels[:, 1:], None, hidden, weight)", "target"),
        ("LigerFusedLinearDPOLoss()(weight, hidden[:3], labels[:3], None, hidden[:3], weight)", "_input"),
        ("LigerFusedLinearDPOLoss()(weight, hidden, labels.tolist(), None, hidden, weight)", "target"),
        ("LigerFusedLinearDPOLoss()(None, hidden, labels, None, hidden, weight)", "lin_weight"),
        ("LigerFusedLinearDPOLoss()(weight, None, labels, None, hidden, weight)", "_input"),
        ("LigerFusedLinearKTOLoss()(hidden, weight, labels)", "preference_labels"),
        ("LigerFusedLinearKTOLoss()(weight, hidden, labels, None, torch.ones(4) > 0)", "_input"),
        ("LigerFusedLinearKTOLoss()(hidden, weight, labels, None, torch.ones(4) > 0, kl='0')", "kl"),
        ("LigerFusedLinearKTOLoss()(hidden, weight, labels, None, [True, False, True, False])", "preference_labels"),
        ("LigerFusedLinearCPOLoss()(hidden, weight, labels)", "_input"),
        ("LigerFusedLinearSimPOLoss(gamma='0.5')", "gamma"),
        ("LigerFusedLinearSimPOLoss()(weight, hidden, labels + 50)", "target"),
        ("LigerFusedLinearORPOLoss(beta=-0.1)", "beta"),
        ("LigerFusedLinearORPOLoss()(weight, hidden, None)", "target"),
        ("TorchtuneDPOLoss(beta=0)(chosen, rejected, ref_chosen, ref_rejected)", "beta"),
        ("TorchtuneDPOLoss(loss_type='ipo')", "loss_type"),
        ("TorchtuneDPOLoss()(chosen, rejected)", "logps"),
        ("TorchtuneDPOLoss()(chosen, rejected, None, None)", "logps"),
        ("OpenRLHFDPOLoss()", "beta"),
        ("OpenRLHFDPOLoss('0.1')(chosen, rejected, ref_chosen, ref_rejected)", "beta"),
        ("OpenRLHFDPOLoss(0.1, 0.7)(chosen, rejected, ref_chosen, ref_rejected)", "label_smoothing"),
        ("OpenRLHFDPOLoss(0.1)(chosen, rejected, None, None)", "reference_chosen_logps"),
        ("get_batch_logps(labels, logits)", "logits"),
        ("get_batch_logps(logits[:, 1:], labels)", "labels"),
        ("get_batch_logps(logits.tolist(), labels)", "logits"),
        ("preference_loss(chosen, rejected, ref_chosen, ref_rejected)", "beta"),
        ("preference_loss(chosen, rejected, ref_chosen, None, 0.1)", "reference_rejected_logps"),
        ("preference_loss(chosen, rejected[:1], ref_chosen, ref_rejected, 0.1)", "policy_rejected_logps"),
    ],
}
# Command lines of dpo-kernels.
COMMANDS = [
    ("", "{train"),
    ("tran", "tran"),
    ("--beta 0.1", "{train|beta"),
    ("train --betta 0.1", "betta"),
    ("train --beta", "beta"),
    ("train --beta -1", "beta"),
    ("train --beta strong", "beta"),
    ("train --bet 0.2", "bet"),
    ("train --loss-type dpo", "loss_type"),
    ("train --no-beta", "beta"),
    ("train --add-eos perhaps", "perhaps"),
    ("train --num-train-epochs 1", "num_train_epochs|num-train-epochs"),
    ("train --dataset demo", "model"),
    ("train no-such.yaml", "no-such.yaml"),
    ("train {unknown}", "betta"),
    ("train {list}", "list.yaml"),
    ("train {broken}", "broken.yaml"),
    ("train {value}", "beta"),
    ("train --model no/such-model --dataset {data} --output-dir {out}", "no/such-model"),
    ("train --model demo --dataset no-such.jsonl --output-dir {out}", "no-such.jsonl"),
    ("train --model config:nowhere.json --tokenizer train:300 --dataset {data} --output-dir {out}", "nowhere.json"),
    ("train --model demo --dataset {data} --output-dir {data}", "output_dir"),
    ("train --model demo --dataset {data} --output-dir {out} --impl cuda", "impl"),
    ("preview -n -1", "pairs"),
    ("preview -n many", "pairs"),
    ("preview --dataset no-such.jsonl --model demo", "no-such.jsonl"),
    ("preview no-such.yaml", "no-such.yaml"),
    ("plan", "batch"),
    ("plan --hidden 64 --batch 1 --seq 8", "vocab"),
    ("plan --hidden 64 --vocab 100 --batch 1", "seq"),
    ("plan --hidden 0 --vocab 100 --batch 1 --seq 8", "hidden"),
    ("plan --hidden 64 --vocab 100 --batch 0 --seq 8", "batch"),
    ("plan {step} --labelled 50", "labelled"),
    ("plan {step} --labelled nan", "labelled"),
    ("plan {step} --dtype bf16", "dtype"),
    ("plan {step} --memory -1", "memory"),
    ("plan {step} --memory nan", "memory"),
    ("plan {step} --device tpu", "device"),
    ("plan {step} --impl gpu", "impl"),
    ("plan {step} --json /no/such/folder/x.json", "json"),
    ("plan --hidden 64.5 --vocab 100", "hidden"),
    ("plan --model no-such-model --batch 1 --seq 8", "no-such-model"),
    ("plan no-such.yaml", "no-such.yaml"),
    ("plan --betta 1", "betta"),
    ("bench --hidden 0", "hidden"),
    ("bench --tokens -4", "tokens"),
    ("bench --mode fast", "mode"),
    ("bench --model no-such-model", "no-such-model"),
    ("bench --device tpu", "device"),
    ("bench --impl cuda --device cpu {size}", "impl"),
    ("bench --peers Nobody {size}", "peers"),
    ("bench --rounds 0 {size}", "rounds"),
    ("bench --dtype int8", "dtype"),
    ("bench --chunk-gib -1 {size}", "chunk"),
    ("bench --max-length 0 --mask real {size}", "max-length|max_length"),
    ("tune --hidden 4", "vocab"),
    ("tune --vocab 4", "hidden"),
    ("tune --hidden 0 --vocab 4", "hidden"),
    ("tune --hidden 4 --vocab -1", "vocab"),
    ("tune --hidden many --vocab 4", "hidden"),
    ("tune --model no-such-model", "no-such-model"),
    ("tune --model Qwen/Qwen3-8B --hidden 4", "model"),
    ("tune --device tpu", "device"),
    ("tune --device xpu", "device"),
    ("tune --device cuda:x", "device"),
    ("tune --dtype int8", "dtype"),
    ("tune --patience 0", "patience"),
    ("tune --patience nan", "patience"),
    ("tune --betta 1", "betta"),
    ("tune mine", "mine"),
    ("env --json", "json"),
    ("env cuda", "cuda"),
]
# Group, call, name.
ENTRIES = [(group, call, word) for group, calls in CALLS.items() for call, word in calls]
ENTRIES += [("commands", f"command({line!r})", word) for line, word in COMMANDS]

# Calls whose error is another library's, which says what is wrong, or Python's: of a name that a module or an output
# does not have.
OTHERS: set[str] = {
    "linear_dpo_loss(hidden.requires_grad_(), weight, labels, ref_logps).chosen_rewards.mean().backward()",
    "fused(**inputs, fused_lm_head=True).logits",
    "fused(**inputs, fused_lm_head=True)['logits']",
    "trl_module.SimPOTrainer",
    "trl_module.DPOTrainer()",
    "trl_trainer(betta=0.1)",
    "trl_module.DPOTrainer(model=model, args=trl_config(), train_dataset=trl_rows, tokenizer=tokenizer)",
}


class Outcome(NamedTuple):
    text: str
    """As the table has it."""
    fault: str
    """Why it is no good error, or nothing."""


@functools.cache
def shared():
    """What takes long to make and no call changes."""
    from dpo_kernels.data.demo import demo_model, demo_preferences, demo_tokenizer

    warnings.simplefilter("ignore")
    dataset = demo_preferences(8)
    texts = [message["content"] for row in dataset for part in ("prompt", "chosen") for message in row[part]]
    model = demo_model(VOCAB, hidden_size=HIDDEN, layers=1, heads=1).eval()
    folder = tempfile.TemporaryDirectory(prefix="wrong_calls_")  # kept here: it goes with the process
    rows = Path(folder.name) / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in dataset))
    return SimpleNamespace(dataset=dataset, tokenizer=demo_tokenizer(texts, 300), model=model, folder=folder, rows=rows)


def namespace():
    """What the calls are made of: names of the package, and tensors that are new each time."""
    from dpo_kernels import compat, data, models, planning, training
    from dpo_kernels.data import demo

    common = shared()
    draw = torch.Generator().manual_seed(0)
    names = {}
    for module in (planning, training, data, models, compat, dpo_kernels):
        names |= {name: getattr(module, name) for name in module.__all__}
    names |= {name: getattr(demo, name) for name in ("demo_model", "demo_preferences", "demo_tokenizer")}
    names |= {"torch": torch, "nan": float("nan"), "inf": float("inf"), "VOCAB": VOCAB, "HIDDEN": HIDDEN}
    sequences = 2 * PAIRS

    def normal(*size):
        return torch.randn(*size, generator=draw)

    labels = torch.randint(VOCAB, (sequences, LENGTH), generator=draw)
    ids = labels.clone()
    labels[:, :2] = -100
    labels[0, -1] = VOCAB - 1
    model = common.model
    names |= {
        "hidden": normal(sequences, LENGTH, HIDDEN),
        "weight": normal(VOCAB, HIDDEN),
        "bias": normal(VOCAB),
        "logits": normal(sequences, LENGTH, VOCAB),
        "labels": labels,
        "ones": torch.ones(sequences, LENGTH),
        "ref_logps": -normal(sequences).abs(),
        **{name: -4 - normal(PAIRS).abs() for name in ("chosen", "rejected", "ref_chosen", "ref_rejected")},
        "lengths": torch.tensor([3, 4]),
        "good": torch.tensor([True, False]),
        "layer": torch.nn.Linear(HIDDEN, VOCAB),
        "output": SimpleNamespace(logits=normal(sequences, LENGTH, VOCAB)),
        "ids": ids,
        "mask": torch.ones_like(ids),
        "batch": {"input_ids": ids},
        "model": model,
        "tokenizer": common.tokenizer,
        "dataset": common.dataset,
        "rows": common.dataset.to_list()[:2],
        "path": str(common.rows),
        "folder": common.folder.name,
        "pair": {"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5]},
        "file": _file,
        "filled": _filled,
        "twice": lambda loss: (loss.backward(retain_graph=True), loss.backward()),
        "with_graph": lambda loss, of: torch.autograd.grad(
            torch.autograd.grad(loss, of, create_graph=True)[0].square().sum(), of
        ),
        "command": _command,
    }
    names |= {
        "given": tuple(names[name] for name in ("hidden", "weight", "labels", "ref_logps")),
        "pairs": tuple(names[name] for name in ("chosen", "rejected", "ref_chosen", "ref_rejected")),
        "both": {"chosen_lengths": names["lengths"], "rejected_lengths": names["lengths"]},
        "inputs": {"input_ids": ids, "labels": ids},
        "sizes": {"hidden": 64, "vocab": 100, "pairs": 1, "seq": 8, "labelled": 0.5},
    }
    return _Later(names, model)


class _Later(dict):
    """Names that take longer, made where a call has them."""

    def __init__(self, names, model):
        super().__init__(names)
        self.model = model

    def __missing__(self, name):
        if name == "head":
            return dpo_kernels.LMHead.from_model(self.model, check=False)
        if name == "model_hidden":
            return dpo_kernels.LMHead.from_model(self.model, check=False).hidden_states(self["ids"])[0].detach()
        if name == "fused":
            fused = copy.deepcopy(self.model)
            self["add_fused_lm_head"](fused, check=False)
            return fused
        if name == "step":
            return self["Step"](**self["sizes"])
        if name == "trl_module":
            return importlib.import_module("dpo_kernels.trl")
        if name == "trl_config":
            return _trl_config
        if name == "trl_rows":
            return shared().dataset
        if name == "trl_trainer":
            return lambda **options: self["trl_module"].DPOTrainer(
                model=copy.deepcopy(self.model),
                ref_model=copy.deepcopy(self.model),
                args=_trl_config(**options),
                train_dataset=shared().dataset,
                processing_class=shared().tokenizer,
            )
        raise KeyError(name)


def _trl_config(**options):
    import trl
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    return trl.DPOConfig(output_dir=f"{shared().folder.name}/trl", report_to=[], use_cpu=True, bf16=False, **options)


def _filled(tensor, value):
    """A copy with the last number replaced."""
    tensor = tensor.clone()
    tensor.view(-1)[-1] = value
    return tensor


@contextlib.contextmanager
def _nowhere():
    """In a folder without files."""
    here, path = Path.cwd(), Path(shared().folder.name) / "nowhere"
    path.mkdir(exist_ok=True)
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(here)


def _file(name, text):
    path = Path(shared().folder.name) / name
    path.write_text(text)
    return str(path)


class CommandFailed(Exception):
    """A command that ended with another status than 0, and what it said."""

    def __init__(self, status, lines):
        self.status, self.lines = status, lines
        super().__init__(f"exit {status}: {' '.join(lines)}")


def _command(line):
    from dpo_kernels.cli import main

    line = line.format(
        unknown=_file("unknown.yaml", "model: demo\ndataset: demo\nbetta: 0.1\n"),
        list=_file("list.yaml", "- model\n- dataset\n"),
        broken=_file("broken.yaml", "model: [demo\n"),
        value=_file("value.yaml", "model: demo\ndataset: demo\nbeta: none\n"),
        data=shared().rows,
            step="--hidden 64 --vocab 100 --batch 1 --seq 8",
            size="--tokens 8 --hidden 8 --vocab 16",
        out=f"{shared().folder.name}/out",
    ) if "{" in line else line  # fmt: skip
    said, logger = io.StringIO(), logging.getLogger("dpo_kernels")
    handlers, level = list(logger.handlers), logger.level
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = main(shlex.split(line))
        except SystemExit as left:  # of argparse
            status = left.code
        finally:
            logger.handlers[:] = handlers
            logger.setLevel(level)
    if status:
        # the usage that argparse puts before an error goes on in lines that are indented
        lines = [
            line
            for line in said.getvalue().splitlines()
            if not re.match(r"usage: | |warning: |$|.*(%\||examples/s)", line)
        ]
        raise CommandFailed(status, lines)
    return status


def outcome(expression, word):
    """Makes the call, and judges what came of it."""
    names = namespace()
    code = compile(expression, "<call>", "eval")
    try:
        with warnings.catch_warnings(), _quiet(), _nowhere():
            warnings.simplefilter("ignore")
            # as globals too, for what stands in a lambda
            result = eval(code, dict(names), names)
    except CommandFailed as failed:
        return Outcome(_one_line(str(failed)), _fault_of_command(failed, word))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return Outcome(_one_line(f"{type(error).__name__}: {error}"), _fault(error, expression, word))
    return Outcome(_one_line(f"no error: {_described(result)}"), "no error")


@contextlib.contextmanager
def _quiet():
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield


def _described(result):
    return re.sub(r"\s+", " ", repr(result))


def _fault_of_command(failed, word):
    if len(failed.lines) != 1:
        return f"{len(failed.lines)} lines"
    if "error:" not in failed.lines[0]:
        return "no line of an error"
    return "" if _names(word, failed.lines[0]) else f"does not name {word}"


def _fault(error, expression, word):
    expected = isinstance(error, (ValueError, TypeError, RuntimeError, ImportError, OSError))
    if expression not in OTHERS and (not expected or isinstance(error, NotImplementedError)):
        return f"a raw {type(error).__name__}"
    message = str(error)
    if expression not in OTHERS and not _on_purpose(error):
        return "a raw error"
    return "" if _names(word, message) else f"does not name {word}"


def _names(word, message):
    """`word` may be one of several: a|b."""
    return any(one in message for one in word.split("|"))


def _on_purpose(error):
    """Whether this package raised it, or Python did since what is called has no such argument, or needs one."""
    last = _frames(error)[-1]
    if isinstance(error, TypeError) and re.search(r"\(\) (missing|got|takes) ", str(error)):
        # in the call itself, in that of a module, or in `explain_unknown`
        return last.filename == "<call>" or last.name in ("_call_impl", "wrapped")
    if not Path(last.filename).is_relative_to(PACKAGE):
        return False
    return linecache.getline(last.filename, last.lineno).strip().startswith("raise ")


def _frames(error):
    return traceback.extract_tb(error.__traceback__)


def _one_line(text):
    """Without what differs from run to run and from machine to machine."""
    text = re.sub(r"\s+", " ", text).strip()
    text = text.replace(shared().folder.name, "FOLDER").replace(str(PACKAGE.parent), "PACKAGE")
    text = re.sub(r"0x[0-9a-f]{6,}", "0x...", text)
    text = re.sub(r"https?://\S+", "URL", text)
    text = re.sub(r"(Expected one of cpu).*", r"\1 ...", text)  # what this version of PyTorch knows
    # argparse quotes them up to Python 3.11
    text = re.sub(r"\(choose from .*?\)", lambda found: found[0].replace("'", ""), text)
    return text[:SHOWN].strip()


def column(matching=""):
    """{call: what it gives} of the package that is imported."""
    return {call: outcome(call, word) for _, call, word in ENTRIES if re.search(matching, call)}


def read_table():
    """{call: (before, now)} of the table as it is."""
    found = {}
    if TABLE.exists():
        for block in TABLE.read_text().split("\n\n"):
            lines = block.strip("\n").split("\n")
            if len(lines) >= 3 and lines[-2].startswith("  before  "):
                found[lines[-3]] = (lines[-2][10:], lines[-1][10:])
    return found


def write_table(before, now):
    blocks = ["Wrong calls, what they gave before and what they give now: see wrong_calls.py."]
    group = None
    for name, call, _ in ENTRIES:
        head = "" if name == group else f"== {name}\n\n"
        group = name
        same = "  before  the same" if before.get(call) == now[call] else f"  before  {before.get(call, '?')}"
        blocks.append(f"{head}{call}\n{same}\n  now     {now[call]}")
    TABLE.write_text("\n\n".join(blocks) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only-column", type=Path, metavar="FILE", help="write what calls give to FILE, and no table")
    parser.add_argument("--before", type=Path, metavar="FILE", help="the column of before")
    parser.add_argument("--match", metavar="REGEX", help="print what these calls give, and write no table")
    parser.add_argument("--faults", action="store_true", help="print what is no good error")
    options = parser.parse_args()
    print(dpo_kernels.__file__, file=sys.stderr)
    if options.match:
        for call, found in column(options.match).items():
            print(f"{call}\n  {found.fault}\n  {found.text}")
        return
    outcomes = column()
    now = {call: outcome.text for call, outcome in outcomes.items()}
    if options.only_column:
        options.only_column.write_text(json.dumps(now, indent=1))
        return
    if options.before:
        before = json.loads(options.before.read_text())
    else:
        table = read_table()
        before = {call: now if then == "the same" else then for call, (then, now) in table.items()}
    write_table(before, now)
    if options.faults:
        for _, call, _ in ENTRIES:
            if outcomes[call].fault:
                print(f"{call}\n  {outcomes[call].fault}\n  {outcomes[call].text}")


if __name__ == "__main__":
    main()
