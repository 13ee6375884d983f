"""torch.compile takes a whole training step as one graph: the operations are custom operators, and no layer reads a
number from a tensor."""

import pytest
import torch

from memtier.testing import tiny_model

# compiling takes seconds: each way of far attention once, with what else there is shared between them
CASES = {
    "span": ("span", {"num_hidden_layers": 2, "layer_types": ["mamba2", "bmojo"], "memory_layers": [1]}),
    "dense-with-sinks": (
        "dense",
        {"num_hidden_layers": 1, "layer_types": ["bmojo"], "memory_layers": [0], "sink_tokens": 3, "landmark_keys": 2},
    ),
}


@pytest.mark.parametrize(("far_attention", "overrides"), CASES.values(), ids=CASES)
def test_a_training_step_is_one_graph_and_gives_the_same_gradients(far_attention, overrides):
    model = tiny_model(dtype=torch.float64, **overrides)
    x = torch.randint(0, 256, (2, 90), generator=torch.Generator().manual_seed(1))

    def loss(ids):
        return model(ids, labels=ids, marks={41}, far_attention=far_attention).loss

    torch._dynamo.reset()
    results = []
    for step in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        value = step(x)
        value.backward()
        results.append((value.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (plain, grads), (compiled, compiled_grads) = results
    torch.testing.assert_close(compiled, plain)
    assert grads.keys() == compiled_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(compiled_grads[name], grad, msg=lambda m, n=name: f"{n}: {m}")
