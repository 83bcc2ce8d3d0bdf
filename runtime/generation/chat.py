"""A conversation over one engine, and the loop that holds it in a terminal."""

from collections.abc import Callable, Collection, Sequence

from edgekit.common.plural import counted
from edgekit.errors import EdgekitError
from edgekit.models.tokenizer import TextTokenizer
from edgekit.runtime.engines.engine import Engine
from edgekit.runtime.generation.generate import Generation, GenerationResult, generate
from edgekit.runtime.generation.sampling import SamplingParams

Message = dict[str, str]

COMMANDS = "/reset starts a new conversation, /exit ends it, /help says this"

# The share of the context, 1/4, that old turns make room in for an answer, if it may be so long.
_ROOM = 4

# Far above the 4 of ordinary text: it only spares the tokenizer what cannot fit anyway.
_BYTES_PER_TOKEN = 256


def first_messages(system: str | None) -> list[Message]:
    """Return the messages a conversation starts from."""
    return [] if system is None else [{"role": "system", "content": system}]


def longest_text(context: int) -> int:
    """Return the bytes beyond which no text is worth tokenizing for a context."""
    return context * _BYTES_PER_TOKEN


def check_length(text: str | bytes, context: int) -> None:
    """Refuse a text beyond `longest_text` before it is tokenized, which costs its length."""
    if len(text) > longest_text(context):
        raise EdgekitError(
            f"a prompt of more than {longest_text(context):,} bytes does not fit the context of "
            f"{context}"
        )


def prompt_ids(tokenizer: TextTokenizer, messages: Sequence[Message], context: int) -> list[int]:
    """Return the ids of messages in the model's chat template, which brings its own bos.

    Raises `EdgekitError` where they are far too long for a context of `context` tokens.
    """
    text = tokenizer.chat(list(messages))
    check_length(text, context)
    return tokenizer.encode(text, add_special=False)


class Chat:
    """Turns of a conversation; what the engine has processed is kept from turn to turn.

    Where a question and its answer would not fit the context behind all turns, the oldest are left
    out: `forgotten` is how many turns, a question and its answer each, the last `ask` left out.
    """

    messages: list[Message]
    forgotten: int
    _asked: list[Message]
    _processed: list[int]

    def __init__(
        self,
        engine: Engine,
        tokenizer: TextTokenizer,
        params: SamplingParams,
        eos_ids: Collection[int],
        system: str | None = None,
        max_tokens: int | None = None,
        stop_strings: Sequence[str] = (),
    ) -> None:
        """Start a conversation; `max_tokens` and `stop_strings` hold for each answer."""
        self.engine = engine
        self._tokenizer = tokenizer
        self._params = params
        self._eos_ids = eos_ids
        self._system = system
        self._max_tokens = max_tokens
        self._stop_strings = stop_strings
        self.reset()

    def reset(self) -> None:
        """Start a new conversation."""
        self.messages = first_messages(self._system)
        self.forgotten = 0
        self._forget()

    def ask(self, text: str) -> Generation:
        """Prepare the answer to a question; `EdgekitError` where it alone does not fit the context.

        Until its answer is kept, a question leaves no trace in the conversation.
        """
        messages, ids, self.forgotten = self._prompt(text)
        if not self._continues(ids):
            self._forget()
        answer = generate(
            self.engine,
            self._tokenizer,
            ids,
            self._params,
            self._max_tokens,
            self._stop_strings,
            self._eos_ids,
        )
        self._asked = messages
        return answer

    def keep(self, answer: Generation) -> GenerationResult:
        """Make the answer, whole or interrupted, a part of the conversation."""
        result = answer.result()
        self.messages = [*self._asked, {"role": "assistant", "content": result.text}]
        if result.reason == "interrupted":
            self._forget()  # the signal may have come between a forward pass and its count
        else:
            self._processed = answer.processed
        return result

    def _prompt(self, text: str) -> tuple[list[Message], list[int], int]:
        """Return messages that leave room for an answer, their ids, and how many turns are gone.

        The system message and the question stay, however little room they leave.
        """
        context = self.engine.context
        room = min(context // _ROOM, self._max_tokens or context)
        system, question = first_messages(self._system), {"role": "user", "content": text}
        alone = prompt_ids(self._tokenizer, [*system, question], context)
        turns = self.messages[len(system) :]
        for gone in range(0, len(turns), 2):
            messages = [*system, *turns[gone:], question]
            ids = self._tokenizer.encode(self._tokenizer.chat(messages), add_special=False)
            if len(ids) + room <= context:
                return messages, ids, gone // 2
        return [*system, question], alone, len(turns) // 2

    def _continues(self, ids: list[int]) -> bool:
        """Whether a prompt goes on from what the engine holds.

        The last answer may encode to other ids than those it was generated as, and an answer that
        was begun and not kept has moved the engine on.
        """
        held = len(self._processed)
        return self.engine.position == held < len(ids) and ids[:held] == self._processed

    def _forget(self) -> None:
        self._processed = []
        self.engine.reset()


def converse(
    chat: Chat,
    read: Callable[[], str],
    write: Callable[[str], None],
    note: Callable[[str], None],
) -> None:
    """Hold a conversation until `/exit` or the end of input.

    `read` returns a line or raises `EOFError`; `write` takes the model's text, `note` a line
    about it. Ctrl-C ends an answer, not the conversation, and so does a full context: then the
    oldest turns go, and `note` is told.
    """
    note(COMMANDS)
    while True:
        try:
            if not _turn(chat, read, write, note):
                return
        except KeyboardInterrupt:
            note("Ctrl-D or /exit ends the chat")


def _turn(
    chat: Chat,
    read: Callable[[], str],
    write: Callable[[str], None],
    note: Callable[[str], None],
) -> bool:
    """Read a line and do what it says; False where the conversation ends."""
    try:
        line = read().strip()
    except EOFError:
        return False
    except UnicodeDecodeError as error:
        note(f"the input is not UTF-8: {error.reason} at byte {error.start}")
        return True
    if line == "/reset":
        chat.reset()
        note("new conversation")
        return True
    if line == "/help":
        note(COMMANDS)
    elif line and line != "/exit":
        _answer(chat, line, write, note)
    return line != "/exit"


def _answer(
    chat: Chat, question: str, write: Callable[[str], None], note: Callable[[str], None]
) -> None:
    """Answer one question, or say why not."""
    try:
        answer = chat.ask(question)
    except EdgekitError as error:
        note(str(error))
        return
    if chat.forgotten:
        context = chat.engine.context
        note(f"to fit the context of {context}, {_oldest(chat.forgotten)} forgotten")
    try:
        for piece in answer:
            write(piece)
    except KeyboardInterrupt:
        pass  # the text so far is the answer
    result = chat.keep(answer)
    write("\n")
    note(result.summary())
    if result.reason == "context":
        note("the chat goes on: the oldest turns will be forgotten; /reset starts a new one")


def _oldest(turns: int) -> str:
    return "the oldest turn is" if turns == 1 else f"the {counted(turns, 'oldest turn')} are"
