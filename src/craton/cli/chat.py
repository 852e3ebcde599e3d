"""`craton chat`: talk with a model in the terminal."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from craton.cli.options import (
    DEFAULT_CHAT_MODEL,
    DEFAULT_SAMPLING,
    KV,
    Activations,
    DType,
    Sampling,
    Speculate,
    Threads,
)
from craton.cli.terminal import load_talker, speed_line, stderr, write
from craton.errors import CratonError, UsageError
from craton.inference.settings import SamplingSettings

if TYPE_CHECKING:
    from craton.inference.model import Model

HELP = """\
  /system TEXT  set the system message (without TEXT: show it) and start again
  /reset        forget the conversation
  /image FILE   show it a picture with your next message (a model that sees)
  /save FILE    write the conversation to a JSON file
  /help         this list
  /exit         leave (or Ctrl-D)
  A line that ends with \\ goes on in the next one. Ctrl-C stops an answer."""


def chat(
    model: Annotated[str, Parameter(help="a name or a path")] = DEFAULT_CHAT_MODEL,
    message: Annotated[str | None, Parameter(help="answer this and end (none: a conversation)")] = None,
    *,
    image: Annotated[
        tuple[Path, ...], Parameter(help="a picture for the first message; may be repeated", negative="")
    ] = (),
    system: Annotated[str | None, Parameter(help="the system message")] = None,
    sampling: Sampling = DEFAULT_SAMPLING,
    dtype: DType = "auto",
    threads: Threads = None,
    activations: Activations = "auto",
    speculate: Speculate = "ngram",
    kv: KV = "auto",
) -> None:
    """Talk with a model, also about pictures if it sees. Type /help inside for what can be done there."""
    checked = sampling.settings()
    loaded = load_talker(model, dtype=dtype, threads=threads, activations=activations, speculate=speculate, kv=kv)
    loaded.render([{"role": "user", "content": "."}])  # a model that cannot chat says so now
    conversation = Conversation(loaded, checked, system)
    for file in image:
        conversation.show(file)
    if message is not None:
        conversation.say(message)
        return
    stderr.print("[dim]/help for help, Ctrl-D to leave[/]")
    _prepare_line_editing()
    conversation.run()


class Conversation:
    """The messages so far, and what the user can do with them."""

    def __init__(self, model: Model, sampling: SamplingSettings, system: str | None) -> None:
        self.model, self.sampling, self.system = model, sampling, system
        self.turns: list[dict[str, Any]] = []
        self.pictures: list[str] = []  # files that go with the next message

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The whole conversation as the model sees it."""
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.turns

    def run(self) -> None:
        """Read, answer, until the end of input."""
        while (line := _read()) is not None:
            if not line.strip():
                continue
            if line.startswith("/"):
                if line.strip() in ("/exit", "/quit"):
                    return
                self.command(line.strip())
            else:
                self.answer(line)

    def show(self, file: Path) -> None:
        """Add a picture to the next message. Raises UsageError for a model that does not see, or a file that is no
        picture; FileFormatError for a damaged one."""
        from craton.modalities.image import read_image

        if not getattr(self.model, "sees", False):  # an application shows its model texts alone
            raise UsageError(
                f"{self.model.name} does not see pictures", where=str(file), remedy="take a model such as SmolVLM"
            )
        read_image(file)
        self.pictures.append(str(file.expanduser()))

    def answer(self, text: str) -> None:
        """One turn. An answer that is stopped or fails leaves a conversation that can go on."""
        try:
            self.say(text)
        except CratonError as error:
            stderr.print(f"[red]{stderr.escape(str(error))}[/]")

    def say(self, text: str) -> None:
        """One turn; one that fails is taken back. Raises what answering raises."""
        shown = [{"type": "image", "image": file} for file in self.pictures]
        self.turns.append({"role": "user", "content": [*shown, {"type": "text", "text": text}] if shown else text})
        said = ""
        try:
            stream = self.model.chat(self.messages, stream=True, **self.sampling.model_dump())
            try:
                for piece in stream:
                    said += piece
                    write(piece)
            except KeyboardInterrupt:
                stderr.print(" [dim](stopped)[/]", end="")
            write("\n")
            stderr.print(f"[dim]{speed_line(stream.completion)}[/]")
        except CratonError:
            self.turns.pop()
            raise
        self.pictures = []
        self.turns.append({"role": "assistant", "content": said})

    def command(self, line: str) -> None:
        """A line that begins with a slash."""
        verb, _, rest = line.partition(" ")
        rest = rest.strip()
        if verb == "/help":
            stderr.print(HELP, markup=False)
        elif verb == "/reset":
            self.turns.clear()
            self.pictures = []
            stderr.print("[dim]forgotten[/]")
        elif verb == "/image":
            try:
                self.show(Path(rest))
            except CratonError as error:
                stderr.print(f"[red]{stderr.escape(str(error))}[/]")
            else:
                count = len(self.pictures)
                goes = "1 picture goes" if count == 1 else f"{count} pictures go"
                stderr.print(f"[dim]{goes} with your next message[/]")
        elif verb == "/system":
            if rest:
                self.system = rest
                self.turns.clear()
            stderr.print(f"[dim]system message: {stderr.escape(self.system or 'none of yours')}[/]")
        elif verb == "/save":
            self.save(rest)
        else:
            stderr.print(f"[red]unknown command {stderr.escape(verb)}[/] [dim](/help lists them)[/]")

    def save(self, name: str) -> None:
        """Write the messages to a new JSON file; an existing file is never overwritten."""
        if not name:
            stderr.print("[red]/save needs the name of a file[/]")
            return
        try:
            with Path(name).expanduser().open("x", encoding="utf-8") as file:
                json.dump({"model": self.model.name, "messages": self.messages}, file, ensure_ascii=False, indent=2)
        except FileExistsError:
            stderr.print(f"[red]{stderr.escape(name)} exists already; choose another name[/]")
        except OSError as error:
            stderr.print(f"[red]{stderr.escape(name)} could not be written: {error.strerror}[/]")
        else:
            stderr.print(f"[dim]saved {len(self.messages)} messages to {stderr.escape(name)}[/]")


def _read() -> str | None:
    """One message, several lines long where lines end with a backslash; None at the end of input."""
    lines: list[str] = []
    while True:
        try:
            line = input(("› " if not lines else "… ") if sys.stdin.isatty() else "")
        except EOFError:
            if sys.stdin.isatty():
                write("\n")
            return "\n".join(lines) if lines else None
        except KeyboardInterrupt:
            write("\n")
            return ""  # Ctrl-C at the prompt drops the line and nothing else
        lines.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            return "\n".join(lines)


def _prepare_line_editing() -> None:
    # Arrow keys and a history that outlives the program, where the platform has readline.
    try:
        import readline
    except ImportError:
        return
    import atexit
    import contextlib

    from craton.store import home

    history = home() / "chat_history"
    with contextlib.suppress(OSError):  # no history yet
        readline.read_history_file(history)
    readline.set_history_length(1000)

    def write_history() -> None:
        with contextlib.suppress(OSError):  # a read-only home is no reason to fail on leaving
            readline.write_history_file(history)

    if sys.stdin.isatty():
        atexit.register(write_history)
