"""Primed hybrids in the published layout: logits equal to its formulas, computed from the raw tensors."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import memtier
from memtier.errors import ConfigError
from memtier.models.primed_checkpoint import load_primed_checkpoint, primed_checkpoint_config

BOOK = runpy.run_path(str(Path(__file__).with_name("test_grouped_layers.py")))
E, H, G, D, WIDTH, INNER, VOCABULARY, W = 20, 6, 2, 4, 4, 24, 32, 6
CONFIG: dict[str, Any] = {
    "model_type": "hybrid_qwen3", "architectures": ["HybridQwen3ForCausalLM"], "vocab_size": VOCABULARY,
    "hidden_size": E, "intermediate_size": INNER, "num_attention_heads": H, "num_key_value_heads": G, "head_dim": D,
    "hidden_act": "silu", "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}, "attention_bias": False, "bos_token_id": None,
    "eos_token_id": 1, "swa_config": {"window_size": W},
    "gdn_config": {"use_gate": True, "use_short_conv": True, "conv_size": WIDTH, "norm_eps": 1e-5},
    "mamba2_config": {"use_qk_norm": True, "use_pos_emb": False, "ssm_cfg": {"expand": 1, "ngroups": H, "d_state": D}},
}  # fmt: skip
MAMBA = {
    "in_proj.weight": (H * D * 2 + G * D * 2 + H, E), "conv1d.weight": (H * D + 2 * G * D, 1, WIDTH),
    "conv1d.bias": (H * D + 2 * G * D,), "dt_bias": (H,), "A_log": (H,), "D": (H,), "norm.weight": (H * D,),
    "B_norm.weight": (D,), "C_norm.weight": (D,), "out_proj.weight": (E, H * D),
}  # fmt: skip
GDN = {
    "q_proj.weight": (H * D, E), "k_proj.weight": (G * D, E), "v_proj.weight": (G * D, E), "b_proj.weight": (H, E),
    "gk_proj.weight": (H, E), "g_proj.weight": (H * D, E), "o_proj.weight": (E, H * D), "o_norm.weight": (D,),
    "q_conv1d.weight": (H * D, 1, WIDTH), "k_conv1d.weight": (G * D, 1, WIDTH), "v_conv1d.weight": (G * D, 1, WIDTH),
    "A_log": (H,), "dt_bias": (H,),
}  # fmt: skip
ATTENTION = {
    "q_proj.weight": (H * D, E), "k_proj.weight": (G * D, E), "v_proj.weight": (G * D, E), "o_proj.weight": (E, H * D),
    "q_norm.weight": (D,), "k_norm.weight": (D,),
}  # fmt: skip


def named(kind: str, mixer: str) -> dict[str, tuple[int, ...]]:
    """Tensors of one layer, by the names of the format."""
    parts = {
        "*": [("self_attn", ATTENTION)], "SWA": [("swa", ATTENTION)], "M2": [("mamba", MAMBA)], "GDN": [("gdn", GDN)],
        "BMF": [("bmojo_f.bmojo_attn", ATTENTION),
                ("bmojo_f.mamba", MAMBA) if mixer == "mamba2" else ("bmojo_f.gdn", GDN)],
    }[kind]  # fmt: skip
    shapes = {f"{part}.{name}": shape for part, tensors in parts for name, shape in tensors.items()}
    mlp = {"gate_proj": (INNER, E), "up_proj": (INNER, E), "down_proj": (E, INNER)}
    shapes |= {f"mlp.{name}.weight": shape for name, shape in mlp.items()}
    return shapes | {"input_layernorm.weight": (E,), "post_attention_layernorm.weight": (E,)}


def write_model(
    folder: Path, pattern: str, mixer: str = "mamba2", dtype: torch.dtype = torch.float64, **changes: Any
) -> dict[str, torch.Tensor]:
    """A tiny random model in the published layout; its tensors."""
    kinds = pattern.split("-")
    shapes = {
        "model.embed_tokens.weight": (VOCABULARY, E),
        "lm_head.weight": (VOCABULARY, E),
        "model.norm.weight": (E,),
    }
    for layer, kind in enumerate(kinds):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in named(kind, mixer).items()}
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: (0.4 * torch.randn(shape, generator=generator, dtype=torch.float64) + (len(shape) == 1)).to(dtype)
        for name, shape in shapes.items()
    }
    bmojo = {"window_size": W, "tie_attn_weights": True, "ssm_mixer": mixer}
    config = {**CONFIG, "num_hidden_layers": len(kinds), "hybrid_override_pattern": pattern, "bmojo_config": bmojo}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, "dtype": str(dtype)[6:], **changes}))
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return tensors


def module_of(tensors: dict[str, torch.Tensor], prefix: str) -> Any:
    """Raw tensors as the attributes that the formulas of test_grouped_layers ask for."""
    out: dict[str, Any] = {"B_norm": None}
    for name, tensor in tensors.items():
        if name.startswith(prefix) and "." not in (rest := name.removeprefix(prefix)).removesuffix(".weight"):
            part = rest.removesuffix(".weight")
            if part.endswith("_proj"):
                out[part] = lambda x, w=tensor: x @ w.T
            elif rest.endswith(".weight"):
                out[part] = SimpleNamespace(weight=tensor, bias=tensors.get(f"{prefix}{part}.bias"))
            else:
                out[part] = tensor
    return SimpleNamespace(**out)


def attention(part: Any, h: torch.Tensor, f: torch.Tensor | None, window: int) -> torch.Tensor:
    """Window keys j in [i - W + 1, i], fading keys j in [i - 2 W + 1, i - W], rotated to their own positions."""
    rms = BOOK["rms"]

    def turned(x: torch.Tensor) -> torch.Tensor:
        angle = torch.arange(len(x), dtype=x.dtype)[:, None] * 100.0 ** (-torch.arange(0, D, 2, dtype=x.dtype) / D)
        cos, sin = (torch.cat([t, t], dim=-1)[:, None] for t in (angle.cos(), angle.sin()))
        a, b = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-b, a], dim=-1) * sin

    def keys_values(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = part.k_proj(x).view(-1, G, D), part.v_proj(x).view(-1, G, D)
        k = turned(rms(k, part.k_norm.weight, 1e-6))
        return k.repeat_interleave(H // G, 1), v.repeat_interleave(H // G, 1)

    q = turned(rms(part.q_proj(h).view(-1, H, D), part.q_norm.weight, 1e-6))
    near, old = keys_values(h), None if f is None else keys_values(f)
    outputs = []
    for i in range(len(h)):
        seen = slice(max(0, i - window + 1), i + 1)
        k, v = near[0][seen], near[1][seen]
        if old is not None and i >= window:
            before = slice(max(0, i - 2 * window + 1), i - window + 1)
            k, v = torch.cat([old[0][before], k]), torch.cat([old[1][before], v])
        weight = torch.einsum("hd,jhd->hj", q[i], k).mul(D**-0.5).softmax(-1)
        outputs.append(torch.einsum("hj,jhd->hd", weight, v).flatten())
    return part.o_proj(torch.stack(outputs))


def logits_by_the_book(tensors: dict[str, torch.Tensor], pattern: str, mixer: str, ids: torch.Tensor) -> torch.Tensor:
    rms, formulas = BOOK["rms"], {"mamba": BOOK["mamba2_by_the_book"], "gdn": BOOK["deltanet_by_the_book"]}
    x = tensors["model.embed_tokens.weight"][ids]
    for layer, kind in enumerate(pattern.split("-")):
        prefix = f"model.layers.{layer}."
        h = rms(x, tensors[f"{prefix}input_layernorm.weight"], 1e-6)
        if kind in ("M2", "GDN"):
            name = {"M2": "mamba", "GDN": "gdn"}[kind]
            x = x + formulas[name](module_of(tensors, f"{prefix}{name}."), h)
        else:
            f, part = None, {"*": "self_attn", "SWA": "swa", "BMF": "bmojo_f.bmojo_attn"}[kind]
            if kind == "BMF":
                name = "mamba" if mixer == "mamba2" else "gdn"
                f = formulas[name](module_of(tensors, f"{prefix}bmojo_f.{name}."), h)
            window = len(ids) if kind == "*" else W
            x = x + attention(module_of(tensors, f"{prefix}{part}."), h, f, window)
        h = rms(x, tensors[f"{prefix}post_attention_layernorm.weight"], 1e-6)
        gate, up, down = (tensors[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        x = x + (F.silu(h @ gate.T) * (h @ up.T)) @ down.T
    return rms(x, tensors["model.norm.weight"], 1e-6) @ tensors["lm_head.weight"].T


@pytest.mark.parametrize(
    ("pattern", "mixer", "tokens"),
    [("BMF-M2-GDN-SWA", "mamba2", 29), ("BMF-BMF", "gdn", 29), ("*-BMF-*", "mamba2", W)],
    ids=["every kind, beyond the window", "Gated DeltaNet fading", "full attention, inside the window"],
)
@torch.no_grad()
def test_a_published_model_computes_what_its_formulas_say(
    pattern: str, mixer: str, tokens: int, tmp_path: Path
) -> None:
    tensors = write_model(tmp_path, pattern, mixer)
    ids = torch.randint(0, VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(1))
    wanted = logits_by_the_book(tensors, pattern, mixer, ids)
    model = load_primed_checkpoint(str(tmp_path))
    assert (model(ids[None]).logits[0] - wanted).abs().max() < 1e-9 * wanted.abs().max()
    cache, parts = None, []
    for piece in ids[None].split([tokens - 5, 1, 4], dim=1):
        output = model(piece, past_key_values=cache, use_cache=True)
        cache, parts = output.past_key_values, [*parts, output.logits]
    assert (torch.cat(parts, dim=1)[0] - wanted).abs().max() < 1e-9 * wanted.abs().max()


def test_a_published_model_opens_in_the_runtime(tmp_path: Path) -> None:
    pattern = "*-BMF-M2"
    tensors = write_model(tmp_path / "model", pattern, dtype=torch.float32)
    ids = torch.randint(0, VOCABULARY, (200,), generator=torch.Generator().manual_seed(1))
    wanted = logits_by_the_book(tensors, pattern, "mamba2", ids[:W])
    with memtier.open_sync(tmp_path / "store", model=str(tmp_path / "model")) as runtime:
        session = runtime.session("alice")
        got = session.observe(ids[:W].tolist(), logits=True).logits
        assert got is not None and (torch.as_tensor(got) - wanted).abs().max() < 1e-4 * wanted.abs().max()
        session.observe(ids[W:].tolist())
        report = session.inspect()
        assert [layer.kind for layer in report.state.layers] == ["bmojo", "grouped_mamba2"]
        assert report.storage.blocks > 0


def test_weights_in_several_files_load_too(tmp_path: Path) -> None:
    tensors = write_model(tmp_path, "BMF-M2", dtype=torch.float32)
    (tmp_path / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in files if files[name] == file}, str(tmp_path / file))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    state = load_primed_checkpoint(str(tmp_path)).state_dict()
    assert torch.equal(
        state["model.layers.0.mixer.fading.in_proj.weight"], tensors["model.layers.0.bmojo_f.mamba.in_proj.weight"]
    )


@pytest.mark.parametrize(
    ("pattern", "changes", "reason"),
    [
        ("GKA-*", {}, "kind GKA"),
        ("M2*-*DA", {}, "kind"),
        ("BMF", {"bmojo_config": {"window_size": W, "ssm_mixer": "gka"}}, "ssm_mixer='gka'"),
        ("BMF", {"bmojo_config": {"window_size": W, "tie_attn_weights": False}}, "tie_attn_weights=False"),
        ("BMF-SWA", {"swa_config": {"window_size": 2 * W}}, "windows of"),
        ("M2", {"mamba2_config": {"use_pos_emb": True}}, "use_pos_emb=True"),
        ("GDN", {"gdn_config": {"allow_neg_eigval": True}}, "allow_neg_eigval=True"),
        ("GDN-M2", {"gdn_config": {"conv_size": 3}}, "convolutions of widths"),
        ("*", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rotary positions"),
    ],
    ids=str,
)
def test_what_has_no_counterpart_is_refused_by_name(pattern: str, changes: dict[str, Any], reason: str) -> None:
    layers = len(pattern.split("-"))
    stored = {**CONFIG, "num_hidden_layers": layers, "hybrid_override_pattern": pattern, **changes}
    with pytest.raises(ConfigError, match=reason):
        primed_checkpoint_config(stored)


def test_a_tensor_that_is_missing_or_unknown_is_named(tmp_path: Path) -> None:
    tensors = write_model(tmp_path, "BMF", dtype=torch.float32)
    left = {name: t for name, t in tensors.items() if not name.endswith("mamba.A_log")}
    save_file(left, str(tmp_path / "model.safetensors"))
    with pytest.raises(ConfigError, match="A_log"):
        load_primed_checkpoint(str(tmp_path))
    save_file({**tensors, "model.layers.0.bmojo_f.gka.A_log": torch.ones(H)}, str(tmp_path / "model.safetensors"))
    with pytest.raises(ConfigError, match="gka"):
        load_primed_checkpoint(str(tmp_path))
