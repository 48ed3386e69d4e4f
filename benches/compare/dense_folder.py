#!/usr/bin/env python3
"""Makes a safetensors folder, as Hugging Face lays it out, of a GGUF file of the Llama family with a byte-level BPE tokenizer.

The weights are dequantized to F16: what such a folder shows is the road from a folder to the node, and what `node.quantize` costs
against the same weights unquantized. Needs `pip install gguf safetensors numpy`.

    dense_folder.py MODEL.gguf FOLDER
"""

import argparse
import json
import pathlib

import numpy as np
from gguf import GGUFReader, dequantize
from safetensors.numpy import save_file

PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
CONTROL, USER_DEFINED = 3, 4


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("gguf", type=pathlib.Path)
    args.add_argument("folder", type=pathlib.Path)
    args = args.parse_args()
    reader = GGUFReader(args.gguf)
    field = lambda key, default=None: reader.fields[key].contents() if key in reader.fields else default
    if field("general.architecture") != "llama" or field("tokenizer.ggml.model") != "gpt2":
        raise SystemExit(f"{args.gguf} is no Llama with a byte-level BPE tokenizer")
    args.folder.mkdir(parents=True, exist_ok=True)
    write = lambda name, value: (args.folder / name).write_text(json.dumps(value, ensure_ascii=False))
    tensors = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1].tolist())
        name = their_name(tensor.name)
        heads = {"q_proj": "llama.attention.head_count", "k_proj": "llama.attention.head_count_kv"}.get(name.split(".")[-2])
        tensors[name] = (halves(values, field(heads)) if heads else values).astype(np.float16)
    save_file(tensors, args.folder / "model.safetensors")
    write("config.json", config(field, "lm_head.weight" not in tensors))
    write("tokenizer.json", tokenizer(field))
    write("tokenizer_config.json", tokenizer_config(field))


def their_name(name):
    base = name.removesuffix(".weight")
    if base in WHOLE:
        return f"{WHOLE[base]}.weight"
    _, layer, part = base.split(".")
    return f"model.layers.{layer}.{PARTS[part]}.weight"


def halves(values, heads):
    """Rows of heads from interleaved rotary order, as GGUF has them, to halves."""
    rows, cols = values.shape
    return np.ascontiguousarray(values.reshape(heads, rows // heads // 2, 2, cols).swapaxes(1, 2).reshape(rows, cols))


def config(field, is_tied):
    key = lambda name, default=None: field(f"llama.{name}", default)
    heads = key("attention.head_count")
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": len(field("tokenizer.ggml.tokens")),
        "hidden_size": key("embedding_length"),
        "num_hidden_layers": key("block_count"),
        "intermediate_size": key("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": key("attention.head_count_kv", heads),
        "head_dim": key("attention.key_length", key("embedding_length") // heads),
        "max_position_embeddings": key("context_length"),
        "rms_norm_eps": key("attention.layer_norm_rms_epsilon"),
        "rope_theta": key("rope.freq_base", 10000.0),
        "hidden_act": "silu",
        "tie_word_embeddings": is_tied,
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
    }


def tokenizer(field):
    tokens, kinds = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    marked = [i for i, kind in enumerate(kinds) if kind in (CONTROL, USER_DEFINED)]
    if field("tokenizer.ggml.pre") != "smollm":
        raise SystemExit("only the splitting rule 'smollm' is written here")
    words = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": tokens[i], "special": kinds[i] == CONTROL, **plain} for i in marked],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, words]},
        "post_processor": None,
        "decoder": words,
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": field("tokenizer.ggml.merges"),
        },
    }


def tokenizer_config(field):
    tokens = field("tokenizer.ggml.tokens")
    return {
        "bos_token": tokens[field("tokenizer.ggml.bos_token_id")],
        "eos_token": tokens[field("tokenizer.ggml.eos_token_id")],
        "add_bos_token": bool(field("tokenizer.ggml.add_bos_token", False)),
        "chat_template": field("tokenizer.chat_template"),
    }


if __name__ == "__main__":
    main()
