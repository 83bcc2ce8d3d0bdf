"""Quantization-aware training of the benchmark's nets, from the float checkpoint.

The loop is that of `benchmarks.cifar.train` with a small step that falls to nearly 0 (arXiv
1806.08342, section 3.2: start from a float checkpoint, small steps, quantization delay, batch norms
frozen late). `edgekit.prepare` does the rest.
"""

import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

import edgekit
from benchmarks.cifar.data import Cifar
from benchmarks.cifar.train import BATCH, augmented
from edgekit.quantize.traced.network import QuantizedNetwork

EPOCHS = 1
PEAK, MOMENTUM, DECAY = 0.01, 0.9, 1e-4


def finetune(net: nn.Module, scheme: str, data: Cifar, max_batch: int) -> QuantizedNetwork:
    """Train a float net through a scheme; return what it became, for batches up to `max_batch`.

    Progress goes to stderr. Batches are those of epochs that the float training did not have.
    """
    steps = EPOCHS * (len(data.train) // BATCH)
    training = edgekit.prepare(net, scheme, (data.calibration()[0],), steps=steps)
    optimizer = torch.optim.SGD(net.parameters(), PEAK, MOMENTUM, weight_decay=DECAY, nesterov=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    net.train()
    for epoch in range(EPOCHS):
        started, total = time.perf_counter(), 0.0
        for images, labels in augmented(data.train, seed=1, epoch=epoch):
            loss = F.cross_entropy(net(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            training.step()
            total += float(loss.detach())
        print(
            f"{scheme}: epoch {epoch + 1} of {EPOCHS}: loss {total * EPOCHS / steps:.3f}, "
            f"{time.perf_counter() - started:.0f} s",
            file=sys.stderr,
            flush=True,
        )
    net.eval()
    return training.finalize(max_batch)
