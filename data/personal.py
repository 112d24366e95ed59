r"""Personal data in a message → […]: numbers, e-mail addresses, passwords, codes, keys.

hide_personal("ring 98765 43210, the pin is 4821") → "ring […], the pin is […]"

It knows them by their form alone, so it proves nothing; looks_private() finds more, to be read.
"""

# ruff: noqa: S105
import re

# ---- telephones, cards, accounts: digits, in groups ----------------------------------------------
SEPARATORS = " ().\u00b7\u2010-\u2015/_:,\ufe0f\u20e3-"  # between digits; the last make a 3️⃣
LINK = r"(?:\w{2,10}://|www\.|(?<=\.[a-z]{2})/|(?<=\.[a-z]{3})/)\S*"
UNIT = r"(?:[$€£%]|(?:euro?|usd|dollars?|lire|[kmg]i?b|bytes|bits|sectors|blocks|[km]?hz)\b)"
AMOUNT = rf"[$€£]\s?\d[\d.,]*|(?<![\d.,])\d[\d.,]*+\s?{UNIT}"
NUMBER = re.compile(
    rf"(?i){LINK}|{AMOUNT}"
    r"|(?P<number>(?:(?<![\w/~%&?])|(?<=tel)|(?<=cell))"
    rf"[+(]{{0,2}}\d(?:[{SEPARATORS}]{{0,3}}\d)*+)"  # *+: a long text is read once
)
YEAR, DAY, BYTE = r"(?:19|20)\d\d", r"[0-3]?\d", r"(?:1?\d?\d|2[0-4]\d|25[0-5])"
HARMLESS = re.compile(  # a date, two years, a time, an address of the internet, a version
    rf"(?<!\d)(?:{YEAR}[/.-]{DAY}[/.-]{DAY}|{DAY}[/.-]{DAY}[/.-]{YEAR}|{YEAR}[01]\d[0-3]\d)(?!\d)"
    rf"|^{YEAR}\D{{1,3}}{YEAR}(?!\d)"
    r"|(?<!\d)\d?\d(?::\d\d)+(?!\d)"
    rf"|(?<![\d.]){BYTE}(?:\.{BYTE}){{3}}(?![\d.])"
    r"|(?<![\d.])[1-9]?\d(?:\.\d+)+(?:[~+:-]\d+)*(?!\d)"
)
ASKED = re.compile(  # before a number that would not tell by itself
    r"(?i)\b(?:tel|cel|mob|phone|whatsapp|num|n[°ºr]|call|ring|text|chiam|scriv|llam|anruf|ruf|appel"
    r"|lig|handy)\w*\W{0,3}(?:\w+\W{1,2}){0,2}$"
)


def is_personal(number, before=""):
    """Say whether it looks like the number of a telephone, a card or an account.

    "612 34 56 78", "333/1234567" and "4111.1111.1111.1111" do; "192.168.100.200", "31/5/2024",
    "6-4 7-5 6-7", "2 000 000" and "1.234.567" do not; "12345678" does after "call".
    """
    number = number.replace("\ufe0f\u20e3", "")
    sizes = [len(digits) for digits in re.findall(r"\d+", number)]  # of its groups
    if "+" in number or re.match("00 ?[1-9]", number):
        return sum(sizes) >= 8
    parts = HARMLESS.split(number)
    if len(parts) > 1:
        return any(is_personal(part, before) for part in parts)
    parts = re.split(" ?[/,-] ?", number)
    if len(parts) > 1 and all(len(re.findall(r"\d", part)) >= 9 for part in parts):
        return True  # two numbers, or three

    while len(sizes) > 2 and sizes[-1] == 1:  # "333 1234567 2 times"
        sizes.pop()
    count = sum(sizes)
    if sizes in ([3, 4], [3, 2, 2]):
        return set("./:,").isdisjoint(number)
    if not 8 <= count <= 19 or "," in number or (":" in number and sizes[0] != 3):
        return False
    if sizes == [8] or (sizes == [4, 4] and "-" in number):  # or a range, 6881-6999
        return bool(ASKED.search(before))
    if len(sizes) == 1:
        return True
    if not set("./").isdisjoint(number) and number[0] != "0":
        is_card = count > 8 and set(sizes) == {4}
        return is_card or (count > 8 and sizes[0] == 3 and sizes != [3, 6])
    return min(sizes[1:]) > 1 and len(sizes) <= 5 and (len(sizes) <= 3 or max(sizes) <= 5)


def hide_number(match):
    """Return […] for a match of NUMBER that is personal, the match itself if it is not."""
    text, number = match.string, match["number"]
    if number is None or re.match(r"\w|%|[.-][^\W\d]", text[match.end() : match.end() + 2]):
        return match[0]
    before = text[max(0, match.start() - 30) : match.start()]
    return "[…]" if is_personal(number, before) else match[0]


# ---- addresses, passwords, codes, keys -----------------------------------------------------------
AT = r"(?:@| ?[(\[{<] ?(?:at|@) ?[)\]}>] ?| AT | chiocciola )"
DOT = r"(?:\.| ?[(\[{] ?dot ?[)\]}] ?| DOT | punto )"

# Words before a secret, in English, Italian, Spanish, French, German and Portuguese.
PASSWORD = (
    "password|passwd|passphrase|passcode|pwd|pw|parola d'ordine|contraseña|mot de passe|mdp"
    "|passwort|kennwort|senha"
)
KEY = "pass|wi-?fi|key|chiave|clave|clé|schlüssel|chave"  # these are often of something else
CODE = "pin|otp|code|codice|código|codigo|cvv|cvc|puk|tan"
PASSPORT = "passport|passaporto|pasaporte|passeport|reisepass|passaporte|carta d'identità|ausweis"
IN_LINKS = "token|key|code|secret|sig|signature|pwd|password|pass|otp|auth|session|sid|jwt"
OF = r"(?: [^\W\d]+){0,4}?"  # "of the wifi"
IS = r"(?: ?[:=] ?|,? (?:is|are|was|è|é|e'|era|es|est|ist|war|lautet):? )[\"'“«(]?"
CHECK = r"(?: (?:d\w+|of))? verif\w+ "  # "codice di verifica 482913"
YOURS = "is your|è il tuo|es tu|est votre|ist dein|é o seu"
MIXED = r"(?=\S*\d)(?=\S*[^\W\d_])"  # letters and digits
API_KEY = (
    r"sk-[\w-]{20,}|[rs]k_(?:live|test)_\w{10,}|gh[opsu]_\w{30,}|github_pat_\w{20,}|glpat-[\w-]{20}"
    r"|xox[abprs]-[\w-]{10,}|AKIA[A-Z0-9]{16}|AIza[\w-]{35}|hf_\w{30,}|npm_\w{36}|ya29\.[\w-]{20,}"
    r"|eyJ[\w-]{10,}\.[\w.-]{10,}|\d{8,10}:AA[\w-]{33}|ssh-(?:rsa|ed25519) AAAA\S+"
)
CODICE_FISCALE = "(?i:[a-z]{6}\\d\\d[a-ehlmprst]\\d\\d[a-z]\\d{3}[a-z])"
CONTACT = r"(?i:\btel:|\bwa\.me/|\bphone=(?:%2B)?|@(?=\d{7}))\+?\d(?:[ ().-]{0,2}\d){6,18}"
IBAN = r"(?<!\w)[A-Za-z]{2}\d\d ?[A-Za-z]{0,4}(?: ?\d){8,26}(?: ?[A-Z\d]{1,4}){0,3}(?!\w)"

ALWAYS = [  # the first group of a match is kept
    rf"()(?<![\w.+-])[\w.+-]{{1,64}}{AT}[\w-]{{1,63}}{DOT}\w[\w.-]{{1,200}}",
    rf"((?i:\b(?:{PASSWORD}) ?[:=] ?))[^\s<>]{{4,}}$",
]
WITH_DIGITS = [
    rf"((?i:\b(?:{PASSWORD}|{KEY}){OF}{IS})){MIXED}[^\s<>]{{5,}}",
    rf"((?i:\b(?:{PASSWORD}|wi-?fi){OF}{IS}))\d{{4,}}(?!\S)",
    rf"((?i:\b(?:{PASSWORD}) )){MIXED}[\w!?$#*.-]{{6,}}",
    rf"((?i:(?<!error )(?<!exit )\b(?:{CODE})(?:{OF}{IS}| |{CHECK})))\d{{4,8}}(?![\w.])",
    rf"()(?<![\w.])(?:[A-Z]-)?\d{{4,8}}(?= (?:{YOURS})\b)",
    rf"((?i:\b(?:{PASSPORT})\b\D{{0,15}}?))\b[A-Za-z]{{0,3}}\d{{6,9}}[A-Za-z]{{0,2}}\b",
    rf"([?&#;](?i:[\w-]*(?:{IN_LINKS}))=)(?=[^\s&#]*\d)[^\s&#]{{4,}}",
    rf"()\b(?:{API_KEY})",
    rf"()\b{CODICE_FISCALE}\b",
    rf"(){CONTACT}",
    rf"(){IBAN}",
]
ALWAYS, WITH_DIGITS = [*map(re.compile, ALWAYS)], [*map(re.compile, WITH_DIGITS)]
DIGIT, SEVEN_DIGITS = re.compile(r"\d"), re.compile(r"\d(?:\D{0,6}\d){6}")


def hide_personal(text):
    """Return text with […] in place of personal data: "ring 98765 43210" → "ring […]"."""
    for pattern in ALWAYS + WITH_DIGITS if DIGIT.search(text) else ALWAYS:
        text = pattern.sub(r"\1[…]", text)
    return NUMBER.sub(hide_number, text) if SEVEN_DIGITS.search(text) else text


# ---- what may be left ----------------------------------------------------------------------------
STREET = "via|viale|piazza|vicolo|rue|boulevard|calle|avenida|plaza|rua|indirizzo|address"
PRIVATE = re.compile(
    rf"(?i)\b(?:(?:{PASSWORD}|{KEY}|{CODE}){OF}{IS}\w*\d\S*|(?:{PASSWORD}|{CODE}) \w*\d\S*"
    rf"|(?:{STREET})(?: [^\W\d]+){{1,2}},? \d{{1,4}}(?![\w.])"
    r"|\d+ (?:[^\W\d]+ ){1,2}(?:street|road|avenue)\b)|(?i:straße|strasse|str\.) \d+"
)
TOLD = re.compile(rf"(?i)\b(?:{PASSWORD})(?: ?[:=] ?|,? (?:is|è) )[^\s…]{{4,}}")


def looks_private(text):
    """Return what looks private and is still there, None if nothing does: "via Roma 12"."""
    found = TOLD.search(text) or (DIGIT.search(text) and PRIVATE.search(text))
    return found and found[0]
