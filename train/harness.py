"""Trained models in lm_eval, the language-model evaluation harness, as its model `dmattn`. Needs the extra `eval`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

from dmattn_jax.chat import document_start
from dmattn_jax.decoding import Decoder
from dmattn_jax.generation import complete
from dmattn_jax.io.tokenizers import Tokenizer
from dmattn_jax.sampling import Sampling
from dmattn_jax.scoring import score
from train.errors import ConfigError
from train.run_files import OpenedModel, open_model

MAX_NEW_TOKENS = 256
"""Of tasks that do not say how much they want."""

SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


@register_model("dmattn")
class HarnessModel(TemplateLM):
    """An lm_eval model over any decoder. Texts of every length are read whole; no context is cut off.

    In lm_eval itself: `--model dmattn --model_args run=runs/quickstart`, after `import train.harness`.
    """

    def __init__(
        self,
        run: str | None = None,
        *,
        model: Decoder | None = None,
        tokenizer: Tokenizer | None = None,
        batch_size: int | str = 8,
        best: bool = False,
        **unused: Any,
    ) -> None:
        """Either what `open_model` takes (a run's folder, for example), or a model and its tokenizer. unused: what
        lm_eval passes to every model.

        Raises: ValueError when neither is given, or on a batch size that is not a number.
        """
        super().__init__()
        if run is not None:
            opened = open_model(Path(run), best=best)
            model, tokenizer = opened.model, opened.tokenizer
        if model is None or tokenizer is None:
            raise ValueError("HarnessModel needs run=, or model= and tokenizer=")
        if not str(batch_size).isdecimal():
            raise ValueError(f"batch_size must be a number, got {batch_size!r}")
        self._model, self._text = model, tokenizer
        self._batch_size = int(batch_size)

    @property
    def eot_token_id(self) -> int:
        """What stands before a document, where nothing else does."""
        return document_start(self._text)[0]

    @property
    def tokenizer_name(self) -> str:
        return f"dmattn-{self._text.fingerprint}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self._text.encode(string)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        template = getattr(self._text, "chat_template", None)
        if template is None:
            return "".join(message["content"] + "\n" for message in chat_history)
        return str(template.render(chat_history, add_generation_prompt=add_generation_prompt))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        texts = [self._text.encode(request.args[0]) for request in requests]
        starts = [[self.prefix_token_id]] * len(texts)
        scores = score(self._model, starts, texts, batch_size=self._batch_size)
        return [entry.logprob for entry in scores]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy unless a task asks for sampling; requests of like options are generated together.

        Raises: ValueError on an option that is not implemented.
        """
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        for members in groups.values():
            # Like lengths together: short prompts are padded to the longest.
            members.sort(key=lambda index: len(requests[index].args[0]))
            for first in range(0, len(members), self._batch_size):
                chosen = members[first : first + self._batch_size]
                prompts = [requests[index].args[0] for index in chosen]
                for index, text in zip(chosen, self._continue(prompts, requests[chosen[0]].args[1]), strict=True):
                    texts[index] = text
        return texts

    def _continue(self, prompts: Sequence[str], options: dict[str, Any]) -> list[str]:
        options = dict(options)
        until = options.pop("until", None) or []
        limit = options.pop("max_gen_toks", MAX_NEW_TOKENS)
        sampled = options.pop("do_sample", True)
        sampling = {name: options.pop(name) for name in SAMPLING_OPTIONS if name in options}
        if not sampled:
            sampling["temperature"] = 0.0
        if options:
            raise ValueError(f"generation options {sorted(options)} are not implemented: remove them from the task")
        completions = complete(
            self._model,
            [self._text.encode(prompt) or document_start(self._text) for prompt in prompts],
            max_new_tokens=limit,
            sampling=Sampling(**sampling),
            stop_tokens=self._text.stop_ids,
            stop_strings=[until] if isinstance(until, str) else [stop for stop in until if stop],
            tokenizer=self._text,
        )
        return [completion.text or "" for completion in completions]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        contexts, continuations = [row[1] for row in requests], [row[2] for row in requests]
        scores = score(self._model, contexts, continuations, batch_size=self._batch_size)
        return [(entry.logprob, entry.greedy) for entry in scores]


def evaluate_tasks(
    opened: OpenedModel, tasks: Sequence[str], include_path: Path | None, *, batch_size: int, limit: int | None
) -> str:
    """lm_eval's table of results.

    Raises: ConfigError on a task that lm_eval does not know, or a folder that is not there.
    """
    if include_path is not None and not include_path.is_dir():
        raise ConfigError(f"--include-path must be a folder of tasks, got {include_path}: no such folder")
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise ConfigError(f"no task {', '.join(unknown)}: name one of lm_eval's, or give its folder by --include-path")
    model = HarnessModel(model=opened.model, tokenizer=opened.tokenizer, batch_size=batch_size)
    results = simple_evaluate(
        model, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False, bootstrap_iters=1000
    )
    return f"{opened.path}\n{make_table(results)}"
