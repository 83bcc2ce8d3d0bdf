"""Texts that tell tokenizers apart: what expressions, byte tables and Unicode tables differ in."""

from collections.abc import Iterator

_PROSE = """\
The ferry left at 6:40, ten minutes late, and nobody minded. Ms. O'Leary had packed two
sandwiches (cheese; tomato), a flask of tea and yesterday's paper. "You'll see," she'd said,
"it's never on time -- but it's always on its way!" They'd heard that before; they'll hear it
again. We've counted: it's been late on 27 of 31 days, i.e. 87.1% of July.

“Don’t,” he wrote — and didn’t… Naïve café façades cost €3.50 or £4, ½ a day’s work.
"""

_CONTRACTIONS = (
    "I'm you're he's she'll we'd they've can't I'M YOU'RE HE'S SHE'LL WE'D THEY'VE CAN'T "
    "y'all'd've 'tis 'twas rock'n'roll o'clock 's't're've'm'll'd 'S'T'RE'VE'M'LL'D 'sa 'ReX ''s"
)

_PYTHON = '''\
@dataclass(frozen=True)
class Point:
\t"""A point; `x` and `y` in px."""

    x: float = 0.0
    y: float = -1e-9

    def __matmul__(self, other: "Point") -> float:
        return self.x*other.x + self.y*other.y  # dot product\r\n
if __name__ == "__main__":
    print(f"{Point(1, 2) @ Point(3, 4)=:>8.3f}", file=sys.stderr); sys.exit(0 if True else 1)
'''

_OTHER_CODE = """\
#include <stdint.h>
static inline uint32_t rotl(uint32_t x, int k) { return (x << k) | (x >> (32 - k)); }
/* --- */ for (;;) { if (!p || *p++ != '\\0') break; } // 0x7FFFFFFF 1'000'000 a->b::c<T&&>()
SELECT name, COUNT(*) FROM "users" WHERE e_mail LIKE '%@example.org' GROUP BY 1 HAVING n>=10;
<p class="a&amp;b" style='color:#fff'>x &lt; y</p><!-- note --><br/>
{"key": [1, 2.5e+10, null, true], "nested": {"\\u00e9": "\\n"}}
$ find . -name '*.py' -print0 | xargs -0 grep -nE '^(from|import) ' > /tmp/out.txt 2>&1
user@host:~/src$ git log --oneline -- path/to/file_v2.1.tar.gz && echo $? # done
| a | b |
|---|:-:|
**bold** _it_ `code` [link](https://example.org/a?b=c&d=%20#frag) ~~no~~ ### head
"""

_NUMBERS = (
    "0 1 12 123 1234 12345 123456 1234567 3.14159 -2.5e-10 1,234,567.89 2024-02-29T23:59:60Z "
    "192.168.0.1:8080 +44 20 7946 0018 007 1st 2nd 3rd 4x4 H2O 10^6 1/2 50% #42 No.5 v1.2.3-rc.4 "
    "½ ² Ⅷ ① ١٢٣٤ १२३४ １２３４ 𝟘𝟙"
)

_SPACES = (
    (" a  b   c    d     e        f\tg\t\th \t i\t j \n k\n\nl\n\n\n m \n \n n\r\no\r\n\r\n"
     "p\rq\r\rr"),
    "   leading", "trailing   ", "\ttab", "\n", "\n\n\n\n", " ", "  ", " \n", "\n ", "\r\n\r\n",
    "\t\n\t", "a \n\n  b", "end.\n\n\nNext",
    "x\u00a0y\u2003z\u2009\u202f!\u3000?\u2028line\u2029paragraph\u0085next\u1680\u205f.",
    "a\u00a0\u00a0 b \u00a0c\u3000\u3000d\u200bzero\u2060width\ufeffmark\u00adsoft",
)  # fmt: skip

_EMOJI = (
    "😀 😂😂😂 ok👍! ❤\ufe0f ✈\ufe0e 1\ufe0f\u20e3 #\ufe0f\u20e3 "
    "👋🏽 🧑🏿\u200d🚒 👨\u200d👩\u200d👧\u200d👦 "
    "🏴\u200d☠\ufe0f 🇫🇷🇯🇵 "
    "🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f 😶\u200d🌫\ufe0f 🫠 🦙🦙"
)

_CHINESE = (
    "今天天气很好，我们去公园走了三千步。「你好」，"
    "他说：“价格是128元！”我想在apple工作1314151天～ 𠮷野家"
)

_JAPANESE = (
    "天気がいいから、散歩しましょう。コーヒーは４００円です。ｶﾞｷﾞ ぱパ は\u3099か\u3099 々〆ヶ 『本』"
)

_KOREAN = "한국어 문장입니다. 한글"

_ARABIC = "السلام عليكم، كيف حالك؟ وَالْكِتَابُ محمـــد \u200f(1)\u200e فارسی می\u200cخواهم"

_INDIC = "नमस्ते दुनिया, आप कैसे हैं? क्षत्रिय १५। বাংলা தமிழ் తెలుగు"

_SOUTH_EAST_ASIAN = "สวัสดีครับ วันนี้อากาศดีมาก ๓๔๕ កាន់តែពិសេស བོད་ မြန်မာ"

_OTHER_SCRIPTS = (
    "Здравствуйте, мир! Нещо на български Ελληνικά: όχι· שלום עִבְרִית "
    "Հայերեն ქართული አማርኛ Tiếng Việt İstanbul ığır Straße ẞ Ångström Œuvre"
)

_MARKS = (
    "e\u0301 o\u0308\u0304 Z\u0351\u036b\u0343\u036a\u0302\u0353a\u0322\u0335l\u031b\u0321go\u0321"
    " \u0301 \u0308a n\u0303o a\u20dd ḋ\u0323 q\u0307\u0323 ﬁ Å Å A\u030a"
)

_SYMBOLS = (
    "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ ... --- ___ === +++ *** ??? !!! ``` '''' \"\"\"\" $$$ "
    "<<>> => != <= >= && || ++ -- :: // /* */ ~~ ^^ @@ %% §¶†‡•°¬×÷±∞≈≠∑∫∂←→⇒✓✗ "
    "─│┌█░ ♫ ☃ ©®™ €£¥₹₿ αβγ 𝐀𝓐 Ⓐ ＡＢ"
)

_CONTROLS = (
    "".join(map(chr, range(1, 32))) + "\x7f" + "".join(map(chr, range(0x80, 0xA0))),
    "a\x00b\x00\x00c \x01d\x1b[31mred\x1b[0m \x08\x0b\x0c e\x1f\x7ff",
)

_ODD = (
    "�� ï¿½ Ã© â€™ ĀĠĊĢ \\xff\\u0000 &#xfffd;",
    "\ue000\uf8ff \U000f0000 \U0010ffff \ufffe\uffff \u0378\u0379 \U000e0001 \u2066a\u2069 𐀀 🧿",
    "<| |> <|not_a_token|> <|im_start <|im_end|x> </s> <s> <unk> [INST] <0x0A> [PAD7] ĠĠthe ▁the",
)  # fmt: skip

_LONG = ("a" * 300, "ab" * 150, " " * 200 + "x", "\n" * 100, "9" * 100, "-" * 150, "é" * 100)

TEXTS: tuple[str, ...] = (
    _PROSE,
    _CONTRACTIONS,
    _PYTHON,
    _OTHER_CODE,
    _NUMBERS,
    *_SPACES,
    _EMOJI,
    _CHINESE,
    _JAPANESE,
    _KOREAN,
    _ARABIC,
    _INDIC,
    _SOUTH_EAST_ASIAN,
    _OTHER_SCRIPTS,
    _MARKS,
    _SYMBOLS,
    *_CONTROLS,
    *_ODD,
    *_LONG,
    "",
)
"""Prose, code, numbers, spaces, emoji, scripts of the world, control and unassigned characters."""


def texts_with(special: tuple[str, ...]) -> Iterator[str]:
    """Yield texts in which a tokenizer's own added tokens stand, each in several places."""
    for token in special:
        yield token
        yield f"{token}{token}"
        yield f"a {token} b{token}c\n{token}\n  {token}."
        yield f"{token[:-1]} {token[1:]}"
    yield "".join(special)
    yield " ".join(special)
