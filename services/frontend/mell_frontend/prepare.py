"""From a validated request to what is to be generated and how it is to be shown; no IO, every problem an `ApiError`."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mell_frontend.errors import bad_request, context_exceeded, model_not_found
from mell_frontend.generation import SequenceRequest
from mell_frontend.grammar import calls_grammar, json_grammar, response_schema
from mell_frontend.prompt import chat_prompt, check_ids, text_prompt
from mell_frontend.schema.chat import ChatCompletionRequest, NamedToolChoice, Tool
from mell_frontend.schema.completion import CompletionRequest
from mell_frontend.schema.sampling import SamplingRequest
from mell_frontend.served import ServedModel
from mell_frontend.settings import FrontendSettings
from mell_frontend.tools import BEGIN
from mell_shared.ids import sequence_id
from mell_shared.messages.sampling import Grammar, SamplingParams

_SEED_MASK = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Job:
    """One request, ready to run: its prompts, one set of parameters, and how each choice's text is made.

    Choices are numbered `prompt * n + choice`. `echoes` holds each prompt's text if it is to be repeated.
    """

    model: ServedModel
    prompts: Sequence[Sequence[int]]
    sampling: SamplingParams
    n: int
    stream: bool
    include_usage: bool
    stops: tuple[str, ...] = ()
    parse_tools: bool = False
    echoes: Sequence[str] = field(default=())
    priority: int = 0

    @property
    def choices(self) -> int:
        """How many sequences the request makes."""
        return len(self.prompts) * self.n

    @property
    def most_tokens(self) -> int:
        """What the request is known to need at most; without an output limit, its prompts."""
        return sum(map(len, self.prompts)) + (self.sampling.max_tokens or 0) * self.choices

    def sequences(self, answer_id: str, request_id: str, traceparent: str = "") -> list[SequenceRequest]:
        """Return one request for each choice, in order; they are named after the answer."""
        return [
            SequenceRequest(
                sequence=sequence_id(answer_id, position, choice),
                model=self.model.name,
                prompt_ids=prompt,
                sampling=self.sampling.model_copy(update={"choice": choice}) if choice else self.sampling,
                priority=self.priority,
                request_id=request_id,
                traceparent=traceparent,
            )
            for position, prompt in enumerate(self.prompts)
            for choice in range(self.n)
        ]


def find_model(models: Mapping[str, ServedModel], name: str | None) -> ServedModel:
    """Return the model called `name`, or the only one if none is named; raises `ApiError` (404)."""
    if name is None and len(models) == 1:
        return next(iter(models.values()))
    model = models.get(name or "")
    if model is None:
        raise model_not_found(name or "", list(models))
    return model


def prepare_chat(request: ChatCompletionRequest, models: Mapping[str, ServedModel], settings: FrontendSettings) -> Job:
    """Return the job that a chat completion asks for."""
    model = find_model(models, request.model)
    _check_limits(request, model, settings, prompts=1)
    tools = _tools(request, settings)
    prompt = chat_prompt(
        model,
        request.messages,
        tools,
        request.chat_template_kwargs,
        add_generation_prompt=request.add_generation_prompt,
    )
    if not prompt:
        raise bad_request("messages: the prompt must hold at least one token.", "messages", "empty_prompt")
    limit_param = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
    _check_context(model, [prompt], request.output_limit, ("messages", limit_param))
    if request.top_logprobs and not request.logprobs:
        raise bad_request("top_logprobs needs logprobs to be true.", "top_logprobs", "invalid_value")
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    return Job(
        model=model,
        prompts=[prompt],
        sampling=_sampling(request, request.output_limit, logprobs, _chat_grammar(request, model, tools)),
        n=request.n,
        stream=request.stream,
        include_usage=request.include_usage,
        stops=request.stops,
        parse_tools=bool(tools),
        priority=request.priority,
    )


def prepare_completion(
    request: CompletionRequest, models: Mapping[str, ServedModel], settings: FrontendSettings
) -> Job:
    """Return the job that a legacy completion asks for."""
    model = find_model(models, request.model)
    prompts = request.prompts
    _check_limits(request, model, settings, prompts=len(prompts))
    _refuse_unserved(request)
    params = [f"prompt[{place}]" for place in range(len(prompts))] if request.several else ["prompt"]
    ids = [
        text_prompt(model, text, param, add_special_tokens=request.add_special_tokens)
        for text, param in zip(prompts, params, strict=True)
    ]
    _check_context(model, ids, request.output_limit, ("prompt", "max_tokens"))
    schema = response_schema(request.response_format)
    grammar = None if schema is None else json_grammar(schema, "response_format")
    echoes = [p if isinstance(p, str) else model.tokenizer.decode(p) for p in prompts] if request.echo else []
    return Job(
        model=model,
        prompts=ids,
        sampling=_sampling(request, request.output_limit, request.logprobs, grammar),
        n=request.n,
        stream=request.stream,
        include_usage=request.include_usage,
        stops=request.stops,
        echoes=echoes,
        priority=request.priority,
    )


def _refuse_unserved(request: CompletionRequest) -> None:
    if request.suffix:
        raise bad_request("suffix is not served: the model only goes on with a text.", "suffix", "unsupported")
    if request.best_of is not None and request.best_of != request.n:
        raise bad_request("best_of is not served; ask for n choices and pick one.", "best_of", "unsupported")
    if request.echo and request.logprobs is not None:
        raise bad_request("echo with logprobs is not served: the prompt is not scored.", "echo", "unsupported")


def _check_limits(request: SamplingRequest, model: ServedModel, settings: FrontendSettings, *, prompts: int) -> None:
    """Raise `ApiError` (400) for more than this server wants to do at once, or token ids it does not know."""
    if prompts * request.n > settings.max_choices:
        param = "n" if prompts == 1 else "prompt"
        message = f"{prompts} prompts with n = {request.n} make more than {settings.max_choices} choices."
        raise bad_request(message, param, "invalid_value")
    if len(request.stops) > settings.max_stop:
        raise bad_request(f"stop: at most {settings.max_stop} strings.", "stop", "invalid_value")
    if any(len(stop) > settings.max_stop_chars for stop in request.stops):
        raise bad_request(f"stop: at most {settings.max_stop_chars} characters each.", "stop", "invalid_value")
    if len(request.logit_bias) > settings.max_logit_bias:
        message = f"logit_bias: at most {settings.max_logit_bias} tokens."
        raise bad_request(message, "logit_bias", "invalid_value")
    if request.stream_options is not None and not request.stream:
        raise bad_request("stream_options needs stream to be true.", "stream_options", "invalid_value")
    if request.output_limit is not None and request.min_tokens > request.output_limit:
        message = f"min_tokens is more than the output limit of {request.output_limit} tokens."
        raise bad_request(message, "min_tokens", "invalid_value")
    check_ids(model, list(request.logit_bias), "logit_bias")
    check_ids(model, request.stop_token_ids, "stop_token_ids")


def _check_context(
    model: ServedModel, prompts: Sequence[Sequence[int]], output: int | None, params: tuple[str, str]
) -> None:
    limit = model.max_model_len
    if limit is None:
        return
    longest = max(map(len, prompts))
    if longest + (output or 1) > limit:
        raise context_exceeded(limit, longest, output, params[1] if longest < limit else params[0])


def _tools(request: ChatCompletionRequest, settings: FrontendSettings) -> list[Tool]:
    """Return the tools to show to the model: none with `tool_choice: none`; raises `ApiError` (400)."""
    if len(request.tools) > settings.max_tools:
        raise bad_request(f"tools: at most {settings.max_tools}.", "tools", "invalid_value")
    choice = request.tool_choice
    if choice == "none":
        return []
    if choice is not None and choice != "auto" and not request.tools:
        raise bad_request("tool_choice needs tools.", "tool_choice", "invalid_value")
    if isinstance(choice, NamedToolChoice):
        names = [tool.function.name for tool in request.tools]
        if choice.function.name not in names:
            message = f"tool_choice names {choice.function.name[:64]!r}, which is not among the tools."
            raise bad_request(message, "tool_choice", "invalid_value")
    return request.tools


def _chat_grammar(request: ChatCompletionRequest, model: ServedModel, tools: Sequence[Tool]) -> Grammar | None:
    """Return what binds the output: a forced call, a response format, or (with tools left open) either."""
    schema = response_schema(request.response_format)
    choice = request.tool_choice
    functions = [tool.function for tool in tools]
    if isinstance(choice, NamedToolChoice):
        functions = [function for function in functions if function.name == choice.function.name]
    elif choice != "required" and schema is None:
        return None
    if not functions:
        return None if schema is None else json_grammar(schema, "response_format")
    forced = choice is not None and choice != "auto"
    return calls_grammar(
        functions,
        several=request.parallel_tool_calls and not isinstance(choice, NamedToolChoice),
        special_marks=model.tokenizer.is_special(BEGIN),
        answer=None if forced else schema,
    )


def _sampling(
    request: SamplingRequest, max_tokens: int | None, logprobs: int | None, grammar: Grammar | None
) -> SamplingParams:
    """Return the parameters of the first choice; a seed is drawn if none is given."""
    seed = secrets.randbits(63) if request.seed is None else request.seed & _SEED_MASK
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=request.min_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=max(0, request.top_k),
        min_p=request.min_p,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=request.repetition_penalty,
        logit_bias=request.logit_bias,
        seed=seed,
        ignore_eos=request.ignore_eos,
        stop_token_ids=tuple(request.stop_token_ids),
        logprobs=logprobs,
        grammar=grammar,
    )
