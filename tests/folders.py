"""Random-weight checkpoint folders: the layouts of SD 1.x, 2.1 and XL as their hubs hold them, made small.

What is kept: every component's class and the config values that choose a code path (block types, linear projections,
attention in float32, layers per block, activations, ids of special tokens, padding, prediction type, added conditions).
What is shrunk: widths, depths, the vocabulary, the sample size. Images of 64 pixels make latents of 8 x 8.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

WORDS = (
    "a an the of in on by to with and or from off for this that is photo picture image drawing painting sketch up "
    "airplane aircraft plane jet sky field sea road street room night cat dog bird deer horse ship truck car frog lake "
    "automobile tom cruise elon musk person man woman taking airport park sitting standing flying red blue old big gun"
)
SCHEDULE: dict[str, Any] = {  # what the scheduler files of all three say
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "skip_prk_steps": True,
    "trained_betas": None,
}
TEXT: dict[str, Any] = {  # of all four text encoders; the ids are CLIP's legacy ones, which no tokenizer uses
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 77,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}


def build_sd21(folder: Path) -> Path:
    """Stable Diffusion 2.1: D = 32 (real: 1024), OpenCLIP-H's shape in 3 layers (real: 23), v-prediction at 8 x 8."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(21)
        vocabulary = save_tokenizer(folder / "tokenizer", pad="!", files=("vocab.json", "merges.txt"))
        save_text(folder / "text_encoder", vocabulary, 32, layers=3, activation="gelu", projection=16)
        UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16, 16, 16),
            attention_head_dim=(1, 2, 4, 4),  # real: 5, 10, 20, 20, which are numbers of heads
            cross_attention_dim=32,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            layers_per_block=2,
            norm_num_groups=4,
            use_linear_projection=True,
            upcast_attention=True,
        ).save_pretrained(folder / "unet")
        save_vae(folder / "vae")
    save_scheduler(folder, "DDIMScheduler", prediction_type="v_prediction")
    return save_index(folder, "StableDiffusionPipeline", requires_safety_checker=False)


def build_sdxl(folder: Path) -> Path:
    """Stable Diffusion XL base: D = 32 + 48 (real: 768 + 1280), pooled 48, no attention at the first level."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(10)
        vocabulary = save_tokenizer(folder / "tokenizer")
        save_tokenizer(folder / "tokenizer_2", pad="!")
        save_text(folder / "text_encoder", vocabulary, 32, layers=3, activation="quick_gelu", projection=32)
        save_text(folder / "text_encoder_2", vocabulary, 48, layers=4, activation="gelu", projection=48, projected=True)
        UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16, 32),
            attention_head_dim=(1, 2, 4),  # real: 5, 10, 20
            cross_attention_dim=80,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 3),  # real: 1, 2, 10
            layers_per_block=2,
            norm_num_groups=4,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,  # real: 256
            projection_class_embeddings_input_dim=48 + 6 * 8,  # real: 2816
        ).save_pretrained(folder / "unet")
        save_vae(folder / "vae", scaling_factor=0.13025, force_upcast=True)
    save_scheduler(
        folder, "EulerDiscreteScheduler", prediction_type="epsilon", timestep_spacing="leading", use_karras_sigmas=False
    )
    return save_index(folder, "StableDiffusionXLPipeline", force_zeros_for_empty_prompt=True)


def build_sd3(folder: Path, t5: bool = True) -> Path:
    """Stable Diffusion 3.5 medium: D = 96 (real: 4096), CLIP 32 + 48 (real: 768 + 1280), dual attention in the first of
    three blocks, 16 channels of latents."""
    import torch
    from diffusers import SD3Transformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(35)
        vocabulary = save_tokenizer(folder / "tokenizer")
        save_tokenizer(folder / "tokenizer_2", pad="!")
        save_text(
            folder / "text_encoder", vocabulary, 32, layers=3, activation="quick_gelu", projection=32, projected=True
        )
        save_text(folder / "text_encoder_2", vocabulary, 48, layers=4, activation="gelu", projection=48, projected=True)
        if t5:
            save_t5(folder, "3", width=96)
        SD3Transformer2DModel(
            sample_size=8,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=96,
            caption_projection_dim=32,
            pooled_projection_dim=80,
            pos_embed_max_size=8,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ).save_pretrained(folder / "transformer")
        save_flow_vae(folder / "vae")
    save_flow(folder, shift=3.0)
    return save_transformer_index(folder, "StableDiffusion3Pipeline")


def build_one_clip(folder: Path) -> Path:
    """The layout of the built-in transformer: a Stable Diffusion 3 with one CLIP (D = 32), latents of 4 x 8 x 8 for 32
    pixels."""
    import torch
    from diffusers import SD3Transformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        vocabulary = save_tokenizer(folder / "tokenizer")
        save_text(folder / "text_encoder", vocabulary, 32, layers=2, activation="quick_gelu", projection=32)
        SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=32,
            pos_embed_max_size=4,
            qk_norm="rms_norm",
        ).save_pretrained(folder / "transformer")
        save_vae(folder / "vae")
    save_flow(folder, shift=1.0)
    return folder


def build_flux(folder: Path, guided: bool = True) -> Path:
    """FLUX.1 dev, or schnell if not guided: D = 64 (real: 4096), two double and two single blocks (real: 19 and 38)."""
    import torch
    from diffusers import FluxTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        vocabulary = save_tokenizer(folder / "tokenizer")
        save_text(folder / "text_encoder", vocabulary, 32, layers=3, activation="quick_gelu", projection=32)
        save_t5(folder, "2", width=64)
        FluxTransformer2DModel(
            in_channels=64,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=64,
            pooled_projection_dim=32,
            guidance_embeds=guided,
            axes_dims_rope=(4, 6, 6),
        ).save_pretrained(folder / "transformer")
        save_flow_vae(folder / "vae")
    save_flow(folder, shift=3.0 if guided else 1.0, use_dynamic_shifting=guided)
    return save_transformer_index(folder, "FluxPipeline")


TRANSFORMERS = {
    "sd3": build_sd3,
    "sd3-without-t5": partial(build_sd3, t5=False),
    "flux": build_flux,
    "schnell": partial(build_flux, guided=False),
    "one-clip": build_one_clip,
}

# --- components ------------------------------------------------------------------------------------------------------


def save_tokenizer(folder: Path, pad: str | None = None, files: tuple[str, ...] = ()) -> dict[str, int]:
    """CLIP's tokenizer with a small vocabulary, which is returned. pad: another padding token than the end of the
    text. files: the old layout, those files and no tokenizer.json."""
    from transformers import CLIPTokenizer

    vocabulary, merges = byte_pairs(WORDS.split())
    CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77).save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    if pad is not None:
        config.write_text(json.dumps(json.loads(config.read_text()) | {"pad_token": pad}))
    if files:
        (folder / "tokenizer.json").unlink()
        (folder / files[0]).write_text(json.dumps(vocabulary))
        (folder / files[1]).write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    return vocabulary


def save_text(
    folder: Path,
    vocabulary: dict[str, int],
    width: int,
    *,
    layers: int,
    activation: str,
    projection: int,
    projected: bool = False,
) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        hidden_act=activation,
        projection_dim=projection,
        **TEXT,
    )
    (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).save_pretrained(folder)


def save_vae(folder: Path, **settings: Any) -> None:
    """Four levels as in the real ones: a latent stands for 8 pixels."""
    from diffusers import AutoencoderKL

    AutoencoderKL(
        sample_size=64,
        block_out_channels=(4, 4, 8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        **settings,
    ).save_pretrained(folder)


def save_t5(folder: Path, number: str, width: int) -> None:
    """T5's encoder, and a tokenizer like T5's (pieces that begin with a blank, </s> at the end) with `WORDS`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("\u2581", -3.0)]
    pieces += [(f"\u2581{word}", -5.0) for word in dict.fromkeys(WORDS.split())]
    pieces += [(letter, -8.0) for letter in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ'.,-"]
    own = Tokenizer(models.Unigram(pieces, unk_id=2))
    own.pre_tokenizer = pre_tokenizers.Metaspace()
    own.decoder = decoders.Metaspace()
    own.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, model_max_length=512, **special)
    tokenizer.save_pretrained(folder / f"tokenizer_{number}")
    config = T5Config(
        vocab_size=len(pieces),
        d_model=width,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    T5EncoderModel(config).save_pretrained(folder / f"text_encoder_{number}")


def save_flow_vae(folder: Path) -> None:
    save_vae(
        folder,
        latent_channels=16,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def save_flow(folder: Path, **settings: Any) -> None:
    (folder / "scheduler").mkdir()
    content = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, **settings}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(content))


def save_transformer_index(folder: Path, pipeline: str) -> Path:
    flux = pipeline == "FluxPipeline"
    clip = "CLIPTextModel" if flux else "CLIPTextModelWithProjection"
    t5 = "2" if flux else "3"
    kinds = {
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "text_encoder": ["transformers", clip],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "text_encoder_2": ["transformers", clip],
        f"tokenizer_{t5}": ["transformers", "PreTrainedTokenizerFast"],
        f"text_encoder_{t5}": ["transformers", "T5EncoderModel"],
        "transformer": ["diffusers", "FluxTransformer2DModel" if flux else "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }
    parts = {part: kind if (folder / part).is_dir() else [None, None] for part, kind in kinds.items()}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline, **parts}))
    return folder


def save_scheduler(folder: Path, kind: str, **settings: Any) -> None:
    (folder / "scheduler").mkdir()
    content = {"_class_name": kind, "_diffusers_version": "0.35.0", **SCHEDULE, **settings}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(content))


def save_index(folder: Path, pipeline: str, **settings: Any) -> Path:
    kinds = {
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    parts = {part: kind for part, kind in kinds.items() if (folder / part).is_dir()}
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
    index = {"_class_name": pipeline, "_diffusers_version": "0.35.0", **settings, **parts}
    if pipeline == "StableDiffusionPipeline":
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "image_encoder": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", scheduler]}))
    return folder


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def byte_pairs(words: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's vocabulary layout in small: 256 byte letters, the same ending a word, merges that make each of `words` one
    token, and the two special tokens. Every other word falls into several tokens."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in dict.fromkeys(words)]
    while pairs := Counter(pair for word in pieces for pair in pairwise(word)):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        pieces = [_merged(word, best) for word in pieces]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    return {token: number for number, token in enumerate(tokens)}, merges


def _merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for piece in word:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out
