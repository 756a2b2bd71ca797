"""The persistent decode step, on a CPU in plain torch and on a GPU: against the same model with dense weights."""

import copy

import pytest
import torch
from conftest import DEVICE
from test_fused_decode import check_steps, check_tokens, dense, make_model, pretend, read

from minigpt.decode import DecodeStep, greedy_way
from minigpt.quantization.persistent_step import PersistentStep, persistent_step


@pytest.mark.parametrize(("n_embd", "length"), [(64, 3), (192, 9), (320, 140)])
def test_logits_and_tokens(n_embd, length):
    model = make_model(n_embd=n_embd, n_head=n_embd // 64)
    twin = dense(model)
    check_steps(PersistentStep(model), twin, read(model, twin, (length,)))
