"""How far a server's start has come, read from what its engine writes while it starts.

Engines have no endpoint for it: until they are ready, nothing listens. What is read are the engines' own lines and the
bars of tqdm (files from the hub, shards of weights, captured graphs); tests/backends/launch/recorded has real ones.
An engine that words them anew is shown as `starting` for longer, nothing worse: whether a server is ready is for its
health endpoint to say, not for its log.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final

PHASES: Final = ("starting", "downloading", "loading", "compiling", "warming", "ready")
"""In order. A start does not go back, also where a second model (of drafts, say) is loaded after the first; only from
`loading` that has no progress yet to `downloading`."""
LINE_CHARS: Final = 4096
"""Read of a line at each end; SGLang writes all of its settings on one line."""
DETAIL_CHARS: Final = 200

_ANSI = re.compile(r"\x1b\[[0-9;?]{0,32}[ -/]{0,4}[@-~]")
_BAR = re.compile(r"(\d{1,3})(?:\.\d{1,3})?%(?: Completed)? ?\|")
_AMOUNT = re.compile(r"\| *([\d.]{1,12}[A-Za-z]{0,3})/([\d.]{1,12}[A-Za-z]{0,3}) \[")
# Who wrote a line, and when: vLLM's `(Worker_TP0 pid=7) INFO 11-22 21:38:17 [loader.py:501] `, SGLang's `[date TP0] `.
_PREFIX = re.compile(
    r"^(?:\([\w-]{1,40} pid=\d{1,9}\) )?"
    r"(?:[A-Z]{4,8} [\d-]{5} [\d:]{8} \[[\w.]{1,60}:\d{1,5}\] )?"
    r"(?:\[[\d-]{10} [\d:]{8}[^\]]{0,40}\] )?"
)
_SPACES = re.compile(r"[^\S\n]+")

# What stands before a bar, and the phase that it is a part of. The first that fits counts.
_BARS: Final = (
    (
        re.compile(r"shards|loading (?:safetensors )?weights|loading pt|convert to turbomind|prefetching", re.I),
        "loading",
    ),
    (re.compile(r"captur|deepgemm|compil|autotun|tuning|cuda graph", re.I), "compiling"),
    (re.compile(r"warm", re.I), "warming"),
    (re.compile(r"fetching|download|\.(?:safetensors|json|bin|gguf|model|txt|jinja|pt)\b", re.I), "downloading"),
)
_FILES = re.compile(r"fetching \d+ files", re.I)

# The engines' lines: what they contain, the phase they begin, and how far it is then.
_Rules = tuple[tuple[str, str, float | None], ...]
_UVICORN: Final = ("Application startup complete", "ready", None)
_RULES: Final[Mapping[str, _Rules]] = {
    "sglang": (
        ("Load weight begin", "loading", 0.0),
        ("Load weight end", "loading", 1.0),
        ("KV Cache is allocated", "loading", 1.0),
        ("CUDA graph begin", "compiling", 0.0),
        ("cuda graph begin", "compiling", 0.0),
        ("CUDA graph end", "compiling", 1.0),
        ("cuda graph end", "compiling", 1.0),
        ("Compiling a graph", "compiling", None),
        ("Application startup complete", "warming", None),  # it answers a request of its own first
        ("The server is fired up", "ready", None),
    ),
    "vllm": (
        ("Starting to load model", "loading", 0.0),
        ("Loading weights took", "loading", 1.0),
        ("Warming up model for the compilation", "compiling", None),
        ("Dynamo bytecode transform", "compiling", None),
        ("Compiling a graph", "compiling", None),
        ("torch.compile took", "compiling", 1.0),
        ("Graph capturing finished", "compiling", 1.0),
        ("JIT kernel warmup starting", "warming", None),
        ("init engine (profile, create kv cache, warmup model) took", "warming", None),
        ("Starting vLLM server on", "warming", None),
        _UVICORN,
    ),
    "trtllm": (
        ("Loading weights", "loading", None),
        ("Model init total", "loading", 1.0),
        ("Autotuning process starts", "compiling", None),
        ("Creating CUDA graph instances", "compiling", None),
        ("Run generation-only CUDA graph warmup", "compiling", None),
        ("Run warmup", "warming", None),
        _UVICORN,
    ),
    "lmdeploy": (
        ("Loading weights", "loading", None),
        ("warmup", "warming", None),
        ("warming up", "warming", None),
        _UVICORN,
    ),
    "llamacpp": (
        ("loading model", "loading", None),
        ("initializing, n_slots", "warming", None),
        ("warming up the model", "warming", None),
        ("listening http", "ready", None),
        ("listening on http", "ready", None),
    ),
}
# As asyncio words it for the server's own port; PyTorch's warnings of ports that it tries are worded otherwise.
_DOOMED = re.compile(r"error while attempting to bind on address|Initialization failed\.")


class StartProgress:
    """What one start has come to. Feed it with the lines of the log, in order, standard output and error alike."""

    __slots__ = ("_files_seen", "_rules", "detail", "doomed", "phase", "progress")

    def __init__(self, engine: str) -> None:
        """Of an engine without lines of its own known here only bars are read."""
        self._rules = _RULES.get(engine, ())
        self._files_seen = False
        self.phase = PHASES[0]
        self.progress: float | None = None
        """Of the phase, 0 to 1, where it is known."""
        self.detail = ""
        """The line or bar that was read last, for people; up to 200 characters."""
        self.doomed = False
        """It said that it cannot get ready, though its process may live on: SGLang does when its port is in use."""

    def read(self, line: str) -> bool:
        """Take one line, of any length and content; says whether anything changed."""
        if self.phase == "ready":
            return False
        before = (self.phase, self.progress, self.detail, self.doomed)
        for piece in _pieces(line):
            self._take(piece)
        return before != (self.phase, self.progress, self.detail, self.doomed)

    def _take(self, piece: str) -> None:
        bar = _BAR.search(piece)
        if bar is not None:
            self._take_bar(piece, bar)
            return
        if _DOOMED.search(piece):
            self.doomed, self.detail = True, _shown(piece)
            return
        for words, phase, progress in self._rules:
            if words in piece:
                self._reach(phase, progress, _shown(piece))
                return

    def _take_bar(self, piece: str, bar: re.Match[str]) -> None:
        label = _shown(piece[: bar.start()]).rstrip(" :")
        phase = next((phase for wanted, phase in _BARS if wanted.search(label)), None)
        if phase is None:
            return
        progress: float | None = min(1.0, int(bar[1]) / 100)
        if phase == "downloading":
            files = _FILES.search(label) is not None
            # Where there is a bar of all files, those of single ones only say what it is at.
            self._files_seen |= files
            if self._files_seen and not files:
                progress = self.progress
        amount = _AMOUNT.search(piece, bar.end() - 1)
        self._reach(phase, progress, f"{label}: {amount[1]} of {amount[2]}" if amount else label)

    def _reach(self, phase: str, progress: float | None, detail: str) -> None:
        # Engines say that they load the weights before they look whether these have to be downloaded.
        announced = self.phase == "loading" and not self.progress
        if PHASES.index(phase) >= PHASES.index(self.phase) or (phase == "downloading" and announced):
            self.phase, self.progress, self.detail = phase, progress, detail[:DETAIL_CHARS]


PORT_IN_USE: Final = "the port is in use"
"""How `why_it_ended` begins where that was it."""

# Why a server ended, by the words of its log: what people call it, and how it is recognised. The last line that fits
# one of them is shown, whichever it is.
_CAUSES: Final = (
    (
        "out of memory",
        re.compile(
            r"out of memory|OutOfMemory|Not enough memory|No available memory for the cache|"
            r"less than desired GPU memory|failed to allocate|larger than the available KV cache memory",
            re.I,
        ),
    ),
    (PORT_IN_USE, re.compile(r"address already in use|Failed to bind socket|cannot listen on", re.I)),
    ("the hub wants a token (secret_env: HF_TOKEN)", re.compile(r"gated repo|401 Client Error|GatedRepoError", re.I)),
    (
        "the model was not found",
        re.compile(
            r"Repo id must be in the form|RepositoryNotFound|not a valid model identifier|cannot read the model|"
            r"Can't load the configuration|does not appear to have a file named|is not a GGUF file|"
            r"LocalEntryNotFoundError|OfflineModeIsEnabled",
        ),
    ),
    (
        "the engine does not take a flag",
        re.compile(r"error: (?:argument|unrecognized arguments|the following arguments)|Error: No such option|"
                   r"Error: Invalid value for"),
    ),
    ("no usable GPU", re.compile(r"No CUDA GPUs are available|no NVIDIA driver|Failed to infer device type", re.I)),
    ("not installed", re.compile(r"No module named|is not installed;|cannot run ", re.I)),
)  # fmt: skip
_HARMLESS = re.compile(r"Ignore import error|\bWARNING\b|\[W\]")
_ERROR = re.compile(
    r"(?:^|[\s\]])[\w.]{0,120}(?:Error|Exception)\b ?:|^ *Value error,|\b(?:ERROR|FATAL|CRITICAL)\b|^error:", re.I
)
_EMPTY_ERROR = re.compile(
    r"root cause|EngineDeadError|encountered an issue|For further information|validation errors? for"
)


def why_it_ended(lines: Iterable[str]) -> str:
    """Why a server ended, from the last lines of its log: one sentence for people, empty where there was no line.

    Known causes come before any other error, since engines end with errors about errors; lines that nothing is known
    of come last.
    """
    known = error = last = ""
    for line in lines:
        for piece in _pieces(line):
            text = _shown(piece)
            if not text or _HARMLESS.search(piece):
                continue
            last = text
            cause = next((name for name, wanted in _CAUSES if wanted.search(piece)), None)
            if cause is not None:
                known = f"{cause}: {text}"
            elif _ERROR.search(text) and not _EMPTY_ERROR.search(text):
                error = text
    return known or error or last


def _pieces(line: str) -> list[str]:
    """The lines that a terminal would have shown one over the other; of a very long line its two ends."""
    if len(line) > 2 * LINE_CHARS:
        line = f"{line[:LINE_CHARS]}\r{line[-LINE_CHARS:]}"
    return [piece for piece in re.split(r"[\r\n]+", _ANSI.sub("", line)) if piece.strip()]


def _shown(piece: str) -> str:
    """A line as people are shown it: without who wrote it and when, in printable characters."""
    text = _PREFIX.sub("", piece[:LINE_CHARS])
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return _SPACES.sub(" ", text).strip()[:DETAIL_CHARS].rstrip()
