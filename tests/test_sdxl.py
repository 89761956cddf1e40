"""SDXL as a model of the project: names and MACs at real size; what the commands give, against diffusers' pipeline."""

import gzip
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import HERE, fails, pixels, relative_error, run_command, same, settings_of
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from PIL import Image
from test_sd_sample import BETAS, SCHEDULERS, ended  # noqa: F401  one is a fixture
from tiny_pipelines import by_helper
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import eval.macs
from eval import throughput
from eval.cost.macs import branch_macs, count
from eval.cost.runs import costs_of
from ldm.diffusers_layout import differences, diffusers_names, diffusers_state_dict
from run.families import build, example_inputs, load_config
from run.folder import image_path
from run.spec import RunSpec
from stable_diffusion.checkpoint import load_state_dict
from stable_diffusion.pipeline import load_pipeline
from stable_diffusion.sample import main
from unet_caching.errors import UserError
from unet_caching.files.fitted import fingerprint
from unet_caching.methods.plan import Call, Plan, PlanCache
from unet_caching.pipelines.enable import enable_deepcache

SDXL = load_config(HERE.parent / "configs" / "sdxl.yaml")
FORMAT = json.loads(gzip.decompress((HERE / "formats" / "keys_sdxl_unet_diffusers.json.gz").read_bytes()))
PUBLISHED = {name: torch.empty(shape, device="meta") for name, (shape, _) in FORMAT["keys"].items()}
TOLERANCE = 2e-5
TOKENS, SIZE, POOLED = 12, 16, 20
UNET = {"in_channels": 4, "out_channels": 4, "model_channels": 32, "channel_mult": [1, 2, 2], "num_res_blocks": 2,
        "attention_resolutions": [4, 2], "num_heads": 2, "context_dim": 40, "num_head_channels": 16,
        "linear_projections": True}
XL = {"transformer_depth": [1, 2, 3], "adm_in_channels": POOLED + 6 * 256}
CONFIG = {"name": "sdxl_tiny", "unet": UNET, "xl": XL, "resolution": SIZE, "downsampling": 2, "tokens": TOKENS,
          "sampler": {"sampler": "ddim", "steps": 6, "guidance": 3.0, "branch": 1}}
LEVELS = {"block_out_channels": (32, 64, 64), "layers_per_block": 2, "cross_attention_dim": 40,
          "attention_head_dim": (2, 4, 4), "sample_size": SIZE // 2, "use_linear_projection": True,
          "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
          "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
          "transformer_layers_per_block": (1, 2, 3), "addition_embed_type": "text_time",
          "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": POOLED + 6 * 256}
PROMPTS = ["red fox", "a dog, asleep"]


def text(tokens: list[str], width: int, **changes) -> CLIPTextConfig:
    return CLIPTextConfig(vocab_size=len(tokens), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
                          num_attention_heads=1, max_position_embeddings=TOKENS, bos_token_id=len(tokens) - 2,
                          eos_token_id=len(tokens) - 1, **changes)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """The config of a tiny SDXL with random weights; its diffusers folder and its prompts beside it."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    letters = "!abcdefghijklmnopqrstuvwxyz,"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    encoders = (CLIPTextModel(text(tokens, 16)),
                CLIPTextModelWithProjection(text(tokens, 24, projection_dim=POOLED, hidden_act="gelu")))
    for encoder in encoders:
        torch.nn.init.normal_(encoder.get_input_embeddings().weight, std=3)     # so that prompts show in the images
    vocabulary = {"vocab": {token: i for i, token in enumerate(tokens)}, "merges": [], "model_max_length": TOKENS}
    pipe = StableDiffusionXLPipeline(
        AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, scaling_factor=0.13025,
                      down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2),
        *encoders, CLIPTokenizer(**vocabulary), CLIPTokenizer(**vocabulary, pad_token="!"),
        UNet2DConditionModel(**LEVELS), EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
        add_watermarker=False)
    pipe.save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(CONFIG | {"checkpoint": str(folder / "model")}))
    return folder / "tiny.yaml"


@pytest.fixture
def sample(tiny):
    """The command within this process; returns its exit code."""
    def run(*args, config=tiny) -> int:
        prompts = [] if "--prompt" in args else ["--prompts", tiny.with_name("prompts.txt")]
        return run_command(main, "--config", config, "--threads", 1, "--device", "cpu", *prompts, *args)
    return run


@pytest.fixture(scope="module")
def theirs(tiny):
    """diffusers' pipeline on the same folder, as a function of its scheduler and arguments."""
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny.with_name("model"), local_files_only=True,
                                                     add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)

    def run(scheduler: str = "ddim", caching: dict | None = None, height: int = SIZE, width: int = SIZE, **others):
        pipe.scheduler = SCHEDULERS[scheduler]()
        x = torch.stack([torch.randn(4, height // 2, width // 2, generator=torch.Generator().manual_seed(seed))
                         for seed in range(len(PROMPTS))])
        given = {"latents": x, "num_inference_steps": 6, "guidance_scale": 3.0, "output_type": "latent",
                 "height": height, "width": width} | others
        with enable_deepcache(pipe, **caching or {"interval": 1}):
            return pipe(PROMPTS, **given).images
    return run


# Names and MACs at real size

def test_the_public_names_load_strictly():
    unet = build(SDXL)
    assert not differences(FORMAT["config"], SDXL.unet_arguments)
    load_state_dict(unet, PUBLISHED)
    assert {name: list(value.shape) for name, value in diffusers_state_dict(unet).items()} \
        == {name: list(value.shape) for name, value in PUBLISHED.items()}
    assert sum(parameter.numel() for parameter in unet.parameters()) == 2_567_463_684 and unet.num_branches == 9
    name = "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k.weight"
    with pytest.raises(UserError, match=f"missing {name}$"):
        load_state_dict(unet, {key: value for key, value in PUBLISHED.items() if key != name})


def test_our_names_are_those_of_the_file_in_the_authors_layout():
    """diffusers' converter reads them as its own."""
    unet = build(SDXL)
    own = unet.state_dict()
    file = {f"model.diffusion_model.{name}": value for name, value in own.items()}
    converted = convert_ldm_unet_checkpoint(dict(file), FORMAT["config"] | {
        "class_embed_type": None, "addition_embed_type": "text_time"})
    assert converted.keys() == PUBLISHED.keys()
    names = diffusers_names(unet)
    assert all(converted[names[name]] is value for name, value in own.items())
    load_state_dict(unet, file)


@torch.no_grad()
def macs_by_helper(unet: UNet2DConditionModel, inputs: tuple, branch: int) -> list:
    """The MACs of a full and a cached step of diffusers' own modules, which the authors' helper leaves out."""
    x, _, context, pooled, sizes = inputs
    pipe = SimpleNamespace(unet=unet, scheduler=SimpleNamespace(timesteps=[2, 1]))
    return by_helper(pipe, branch, 2, lambda pipe: [count(lambda t=t: unet(
        x, torch.tensor(t), context, return_dict=False, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}))
        for t in (2, 1)])


def test_macs():
    full, cached = branch_macs(build(SDXL), example_inputs(SDXL), range(9))
    assert [round(value / 1e9, 3) for value in full] == [2989.751, 3380.618]
    assert [round(cached[branch].hook / 1e9, 2) for branch in (0, 1, 2)] == [49.10, 128.03, 223.75]


@pytest.mark.parametrize("size", [pytest.param("real", marks=pytest.mark.slow), "tiny"])
def test_macs_are_those_of_diffusers_network(tiny, size):
    config, sizes, branches = (SDXL, FORMAT["config"], range(9)) if size == "real" else (load_config(tiny), LEVELS, [4])
    full, cached = branch_macs(build(config), example_inputs(config), branches)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**sizes).eval()
    for branch in branches:
        assert macs_by_helper(unet, example_inputs(config), branch) == [full, cached[branch]]


# The commands

@pytest.mark.parametrize("name", ["ddim", "dpmpp"])
def test_the_command_gives_what_diffusers_pipeline_gives(sample, theirs, tmp_path, ended, name):  # noqa: F811
    assert sample("--sampler", name, "--negative-prompt", "green", "--out", tmp_path / "x") == 0
    assert relative_error(ended[0], theirs(name, negative_prompt=["green"] * 2)) < TOLERANCE


@pytest.mark.parametrize("caching", [{"interval": 3}, {"interval": 2, "branch": 3, "forecast": 1}],
                         ids=["reuse", "forecast"])
def test_with_caching_it_gives_what_a_pipeline_gives_with_caching(sample, theirs, tmp_path, ended, caching):  # noqa: F811
    words = [word for name, value in caching.items() for word in (f"--{name}", value)]
    assert sample(*words, "--out", tmp_path / "x") == 0
    expected = theirs(caching=caching)
    assert relative_error(ended[0], expected) < TOLERANCE
    assert relative_error(theirs(), expected) > 50 * TOLERANCE


def test_a_plan_in_every_door(sample, theirs, tiny, tmp_path, ended, capsys):  # noqa: F811
    """The commands and a pipeline compute the same by one file; both refuse what it was not made for."""
    run = RunSpec.of(tiny, steps=6).open()
    calls = [Call(), Call(3), Call(1, (1.0,)), Call(), Call(1, (1.0,)), Call(0)]
    costs = costs_of(run)
    macs = {name: sum(getattr(one, name) for one in costs.calls(PlanCache(calls), 6)) for name in ("hook", "fc")}
    context = run.config.unet.context_dim
    path = tmp_path / "plan.json"
    Plan(run.made_for(), calls, [1.0, 5.0], macs, costs.full._asdict()).save(path)
    assert sample("--plan", path, "--out", tmp_path / "x") == 0
    expected = theirs(caching={"plan": str(path)})
    assert relative_error(ended[0], expected) < TOLERANCE < 1e-3 < relative_error(theirs(), expected)
    assert settings_of(tmp_path / "x")["cache"]["plan"]["branches"] == [None, 3, 1, None, 1, 0]

    capsys.readouterr()
    words = ["--config", tiny, "--plan", path]
    assert run_command(eval.macs.main, *words, "--json") == 0
    assert json.loads(capsys.readouterr().out)["macs"] * 6 == pytest.approx(macs["hook"])
    assert run_command(throughput.main, "run", *words, "--device", "cpu", "--batch-size", 1, "--repeats", 1,
                       "--warmup", 1) == 0
    assert "the run: 6 calls" in capsys.readouterr().out
    assert fails(capsys, sample("--plan", path, "--steps", 5, "--out", tmp_path / "y"), "steps 6 there, 5 here")
    assert fails(capsys, sample("--plan", path, "--guidance", 9, "--out", tmp_path / "y"), "guidance 1 to 5 there")
    with pytest.raises(UserError, match="this run has 5 steps: the plan was made for another run"):
        theirs(caching={"plan": str(path)}, num_inference_steps=5)
    with torch.device("meta"):
        other = UNet2DConditionModel(**LEVELS | {"transformer_layers_per_block": (1, 2, 2)})
    assert fingerprint(other, 4, context) != run.fingerprint


SIZED = ["--height", 24, "--width", 8, "--original-size", "64,48", "--crop", "3,5", "--target-size", "32,30"]


def test_sizes_and_what_it_is_told_of_them(sample, theirs, tmp_path, ended, capsys):  # noqa: F811
    assert sample(*SIZED, "--out", tmp_path / "x") == 0
    expected = theirs(height=24, width=8, original_size=(64, 48), crops_coords_top_left=(3, 5), target_size=(32, 30))
    assert relative_error(ended[-1], expected) < TOLERANCE
    assert Image.open(image_path(tmp_path / "x", 0)).size == (8, 24)
    assert settings_of(tmp_path / "x")["sizes"] == [64, 48, 3, 5, 32, 30]
    assert sample(*SIZED[:4], "--out", tmp_path / "y") == 0
    expected = theirs(height=24, width=8)
    assert relative_error(ended[-1], expected) < TOLERANCE < 1e-3 < relative_error(ended[0], expected)
    assert settings_of(tmp_path / "y")["sizes"] == [24, 8, 0, 0, 24, 8]
    assert fails(capsys, sample("--crop", "1", "--out", tmp_path / "z"), "--crop", "1024,1024")


def test_images_guidance_and_number_formats(sample, theirs, tmp_path):
    words = ["--guidance", 1, "--steps", 3]
    assert sample(*words, "--out", tmp_path / "fp32") == 0
    expected = (255 * theirs(guidance_scale=1.0, num_inference_steps=3, output_type="np")).round().astype(int)
    ours = pixels(tmp_path / "fp32")
    assert all(np.abs(ours[seed] - expected[seed]).max() <= 1 for seed in range(2))
    for dtype in ("bf16", "fp16"):
        assert sample(*words, "--dtype", dtype, "--batch-size", 2, "--out", tmp_path / dtype) == 0
        found = pixels(tmp_path / dtype)
        assert all(np.abs(found[seed] - ours[seed]).mean() < 2 for seed in ours)
        assert settings_of(tmp_path / dtype)["first_stage_dtype"] == "fp32"


def test_without_a_negative_prompt_the_folder_says_what_guidance_leads_away_from(sample, tiny, theirs, tmp_path,
                                                                                ended):  # noqa: F811
    folder = Path(shutil.copytree(tiny.with_name("model"), tmp_path / "model"))
    rewrite(folder / "model_index.json", force_zeros_for_empty_prompt=False)
    assert sample("--model", folder, "--out", tmp_path / "x") == 0
    assert relative_error(ended[0], theirs(negative_prompt=[""] * 2)) < TOLERANCE
    assert relative_error(ended[0], theirs()) > 1e-2            # zeros


def test_diffusers_unet_gives_the_same_images(sample, tmp_path):
    for name, flags in (("ours", []), ("theirs", ["--diffusers-unet"])):
        assert sample("--steps", 3, *flags, "--out", tmp_path / name) == 0
    assert same(tmp_path / "ours", tmp_path / "theirs", tolerance=1)


def test_a_pipeline_of_the_folder(tiny, theirs):
    pipe = load_pipeline(load_config(tiny), tiny.with_name("model"))
    pipe.set_progress_bar_config(disable=True)
    x = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(2)])
    found = pipe(PROMPTS, latents=x, num_inference_steps=6, guidance_scale=3.0, output_type="latent").images
    assert relative_error(found, theirs("plms")) < TOLERANCE


def rewrite(path: Path, **change) -> None:
    """Change a JSON file; a value of None takes its key away."""
    content = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in content.items() if change.get(key, "") is not None}))


def folder_with(tiny: Path, path: Path, files: dict[str, dict]) -> Path:
    """A copy of the model with other values in its JSON files."""
    folder = Path(shutil.copytree(tiny.with_name("model"), path))
    for file, change in files.items():
        rewrite(folder / file, **change)
    return folder


@pytest.mark.parametrize(("config", "files", "words"), [
    ({"xl": XL | {"transformer_depth": [1, 2, 2]}}, {}, ["and should be [1, 2, 2]"]),       # sizes, in every number
    ({"xl": XL | {"adm_in_channels": 8 + 6 * 256}}, {}, ["and should be 1544"]),
    ({"xl": None}, {}, ["StableDiffusionXLPipeline is not a pipeline of Stable Diffusion 1.x or 2.x"]),
    ({}, {"model_index.json": {"_class_name": "StableDiffusionPipeline", "text_encoder_2": None}},
     ["StableDiffusionPipeline is not a pipeline of SDXL"]),
    ({}, {"model_index.json": {"_class_name": "StableDiffusionXLImg2ImgPipeline", "text_encoder": [None, None]}},
     ["StableDiffusionXLImg2ImgPipeline", "[None, None]"]),                         # the refiner
    ({}, {"model_index.json": {"text_encoder_2": ["transformers", "T5EncoderModel"]}}, ["T5EncoderModel"]),
    ({}, {"tokenizer_2/tokenizer_config.json": {"model_max_length": 64}}, ["64", "12"]),
    ({}, {"vae/config.json": {"latents_mean": [0.1] * 4, "latents_std": [1.0] * 4}}, ["latents_mean"]),
    ({}, {"scheduler/scheduler_config.json": {"prediction_type": "v_prediction"}}, ["prediction_type"])])
def test_a_folder_of_another_model_is_refused(sample, tiny, tmp_path, capsys, config, files, words):
    folder, path, content = folder_with(tiny, tmp_path / "model", files), tmp_path / "c.yaml", CONFIG | config
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value} | {"checkpoint": "none"}))
    assert fails(capsys, sample("--model", folder, "--out", tmp_path / "x", config=path), *words)
    if not content["xl"]:
        assert fails(capsys, sample("--crop", "0,0", "--out", tmp_path / "x", config=path), "SDXL")
    assert not (tmp_path / "x").exists()


def test_a_second_text_encoder_that_is_missing(sample, tiny, tmp_path, capsys):
    folder = folder_with(tiny, tmp_path / "model", {})
    (folder / "text_encoder_2" / "model.safetensors").unlink()
    assert fails(capsys, sample("--model", folder, "--out", tmp_path / "x"), "no ", "text_encoder_2/model.safetensors")
