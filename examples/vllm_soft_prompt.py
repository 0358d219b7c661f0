"""A tuned soft prompt at work in vLLM, through prompt embeddings, with the answers of transformers beside it.

    pip install "softprompt-registry[vllm]"
    python examples/vllm_soft_prompt.py --soft-prompt bank#instruments --base-model MODEL --input "a cello" --input "an oboe"

asks vLLM in this process. A server is asked through the completions endpoint of OpenAI's API, with the embeddings in place of
the prompt:

    vllm serve MODEL --enable-prompt-embeds --generation-config vllm
    python examples/vllm_soft_prompt.py … --base-url http://127.0.0.1:8000/v1

The soft prompt is a folder, `models:/…` or `runs:/…`, with `#task` for a member of a bank. MODEL is the base model that it
was tuned on, as a folder or a Hub name. That is loaded in transformers too: for its embedding matrix, to check its
fingerprint, and for the answers to compare with.

What vLLM reads is what the soft prompt was tuned on: [soft tokens][BOS][filled template], one row of numbers for each token.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.soft_prompts.encoding import RowEncoder
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt

if TYPE_CHECKING:
    import torch


def prompt_embeddings(base_model: BaseModel, soft_prompt: SoftPrompt, text: str) -> torch.Tensor:
    """(K + T, D) in the base model's dtype: the soft tokens, and behind them `text`, the filled template, as in tuning."""
    ids = RowEncoder.of(base_model, soft_prompt.record).text(text)
    soft = soft_prompt.embeddings.to(base_model.device)  # (K, D)
    joined = base_model.join(soft[None], [ids], pad_side="right").inputs_embeds[0]
    return joined.detach().cpu()


def ask_in_process(
    model: str, embeddings: Sequence[torch.Tensor], *, max_tokens: int, **engine_settings: Any
) -> list[str]:
    """Greedy answers of vLLM in this process.

    Args:
        model: folder or Hub name.
        embeddings: (K + T, D) for each prompt.
        engine_settings: of `vllm.LLM`, such as `dtype`.
    """
    from vllm import LLM, SamplingParams

    llm = LLM(model=model, enable_prompt_embeds=True, generation_config="vllm", **engine_settings)
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    outputs = llm.generate([{"prompt_embeds": one} for one in embeddings], sampling, use_tqdm=False)
    return [output.outputs[0].text for output in outputs]


def ask_server(base_url: str, model: str, embeddings: Sequence[torch.Tensor], *, max_tokens: int) -> list[str]:
    """Greedy answers of a server started with `--enable-prompt-embeds`.

    Args:
        model: the name that the server knows it by.
        embeddings: (K + T, D) for each prompt, in the dtype that the server runs in.
    """
    from openai import OpenAI

    client = OpenAI(base_url=base_url, api_key=os.environ.get("OPENAI_API_KEY", "none-needed"))
    answers = []
    for one in embeddings:
        reply = client.completions.create(
            model=model, prompt=None, max_tokens=max_tokens, temperature=0.0, extra_body={"prompt_embeds": encoded(one)}
        )
        answers.append(reply.choices[0].text)
    return answers


def encoded(embeddings: torch.Tensor) -> str:
    """As vLLM's server takes them: what `torch.save` writes, in base64."""
    import torch

    # The clone, as torch writes the whole tensor that a view looks at.
    written = io.BytesIO()
    torch.save(embeddings.clone(), written)
    return base64.b64encode(written.getvalue()).decode()


def ask_transformers(
    base_model: BaseModel, soft_prompt: SoftPrompt, texts: Sequence[str], *, max_tokens: int
) -> list[str]:
    """Greedy answers of transformers to compare with."""
    from softprompt_registry.language_models.protocol import CompletionRequest
    from softprompt_registry.portability.soft_prompted import SoftPrompted

    requests = [CompletionRequest(text, max_tokens=max_tokens) for text in texts]
    answers = []
    for result in SoftPrompted(base_model, soft_prompt).complete(requests):
        if isinstance(result, Exception):
            raise result
        answers.append(result.text)
    return answers


@click.command()
@click.option("--soft-prompt", "uri", required=True, help="Folder, models:/…, runs:/…, or one of a bank with #task.")
@click.option("--base-model", required=True, help="Folder or Hub name.")
@click.option("--input", "inputs", required=True, multiple=True, help="A text to give to the soft prompt's task.")
@click.option("--base-url", help="Ask this server instead of vLLM in this process.")
@click.option("--model", help="Name of the model at that server; the base model's, if not given.")
@click.option("--max-tokens", default=16, show_default=True)
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16"]), help="Of the weights; the soft prompt's, if not given."
)
@click.option("--max-model-len", default=4096, show_default=True, help="Longest sequence, for vLLM in this process.")
@click.option("--gpu-memory-utilization", default=0.6, show_default=True, help="Share for vLLM in this process.")
def main(
    uri: str,
    base_model: str,
    inputs: tuple[str, ...],
    base_url: str | None,
    model: str | None,
    max_tokens: int,
    dtype: str | None,
    max_model_len: int,
    gpu_memory_utilization: float,
) -> None:
    """Give inputs to a tuned soft prompt in vLLM and in transformers."""
    from softprompt_registry.base_models.loading import load_base_model_for, model_location
    from softprompt_registry.dod.task import TEMPLATES, fill_template
    from softprompt_registry.registry.artifacts import find_soft_prompts

    soft_prompts = find_soft_prompts(uri)
    if len(soft_prompts) != 1:
        names = ", ".join(one.record.task for one in soft_prompts[:5])
        raise click.UsageError(f"{uri!r} holds {len(soft_prompts)} soft prompts ({names}, …), expected one. Add #task.")
    soft_prompt, record = soft_prompts[0], soft_prompts[0].record
    base = load_base_model_for(record.base_model, override=base_model, dtype=dtype)  # type: ignore[arg-type]
    texts = [fill_template(record.template or TEMPLATES[record.kind], text) for text in inputs]
    embeddings = [prompt_embeddings(base, soft_prompt, text) for text in texts]
    location, revision, _ = model_location(base_model)
    if base_url is not None:
        found = ask_server(base_url, model or base_model, embeddings, max_tokens=max_tokens)
    else:
        found = ask_in_process(
            location,
            embeddings,
            max_tokens=max_tokens,
            revision=revision,
            dtype=str(base.dtype).removeprefix("torch."),
            max_model_len=min(max_model_len, base.max_positions),
            gpu_memory_utilization=gpu_memory_utilization,
        )
    # Targets were tuned with one space before them.
    answers = [answer.removeprefix(" ") for answer in found]
    expected = ask_transformers(base, soft_prompt, texts, max_tokens=max_tokens)
    for text, answer, other in zip(inputs, answers, expected, strict=True):
        click.echo(f"{text!r} -> vLLM {answer!r}, transformers {other!r}")
    same = sum(one == other for one, other in zip(answers, expected, strict=True))
    click.echo(f"{same} of {len(inputs)} answers are the same.")


if __name__ == "__main__":
    main()
