"""Work, counted on graphs whose products can be counted by hand, and against what multiply-accumulates say."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from reft_edge.bundle.manifest import Cost, Work
from reft_edge.compile import compile_bundle
from reft_edge.compile.work import Product


def work_of(module: nn.Module, shape: tuple[int, ...]) -> tuple[Cost, Work, Work]:
    cost = compile_bundle(module, input_shape=shape).manifest.cost
    assert cost.step_work is not None
    assert cost.forward_work is not None
    return cost, cost.step_work, cost.forward_work


def test_a_layer_without_padding_computes_twice_its_multiply_accumulates() -> None:
    torch.manual_seed(0)
    cost, _, forward = work_of(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16)), (64,))
    assert cost.forward_macs == 64 * 32 + 32 * 16
    assert forward.product_flops(48) == pytest.approx(2 * 48 * cost.forward_macs)


def test_few_columns_cost_as_much_as_the_kernel_has() -> None:
    narrow, wide = (Product(rows=32, inner=64, columns=columns, count=1) for columns in (1, 16))
    assert narrow.padded_flops == wide.padded_flops == 16 * 2 * narrow.macs


def test_thin_convolutions_move_more_for_each_operation() -> None:
    def step(channels: int) -> Work:
        torch.manual_seed(0)
        head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4))
        return work_of(
            nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), *head), (channels, 16, 16)
        )[1]

    thin, thick = step(4), step(64)
    assert thick.calls == thin.calls
    assert thick.moved_bytes(32) > thin.moved_bytes(32)
    assert thin.moved_bytes(32) / thin.product_flops(32) > 4 * thick.moved_bytes(32) / thick.product_flops(32)


def test_depthwise_convolutions_are_counted_a_group_each() -> None:
    grouped = Product(rows=1, inner=9, columns=256, count=32 * 64, groups=64)
    dense = Product(rows=64, inner=9 * 64, columns=256, count=32)
    assert 64 * grouped.macs == dense.macs
    assert grouped.moved_bytes > dense.moved_bytes / 2
