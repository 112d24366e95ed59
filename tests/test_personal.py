"""Personal data become […]: data/personal.py."""
# ruff: noqa: RUF001 (chat is in many scripts)

from data.personal import hide_personal, looks_private

import re

import pytest

table = pytest.mark.parametrize


def cells(text):
    return text.strip().replace("\n", "|").split("|")


NUMBERS = """
+39 333 123 4567|3331234567!|(555) 123-4567|+4366412345678|@436641234567|wa.me/4366412345678
tel:0664123456|98765 43210|(11) 98765-4321|8 912 345-67-89|612 34 56 78|+1 (555) 123‑4567
06 12 34 56 78|06.12.34.56.78|0664/1234567|0171-1234567|02 1234 5678|138 1234 5678|010-1234-5678
9123 4567|20 12 34 56|555-1234|555 12 34|+43/664/1234567|+687 75.12.34|00 43 664 1234567
0044 7400 123456|٠٥٠١٢٣٤٥٦٧
555.123.4567|333/1234567|333.1234567|333/12 34 567|333.123.45.67|612.345.678
tel333 1234567|tel=3331234567|cell-3331234567|#3331234567|3331234567/3347654321|333:1234567
3331234567-3347654321|3331234567,3347654321|333 - 1234567|333 / 1234567|333—123—4567
333·123·4567|333_123_4567|3️⃣3️⃣3️⃣1️⃣2️⃣3️⃣4️⃣5️⃣6️⃣7️⃣|3331234567 31/12/2024
333 1234567 2 volte|whatsapp://send?phone=39333123456
https://api.whatsapp.com/send/?phone=%2B393331234567
IT60 X054 2811 1010 0000 0123 456|it60x0542811101000000123456|DE89 3704 0044 0532 0130 00
GB82 WEST 1234 5698 7654 32|4111 1111 1111 1111|4111.1111.1111.1111|4111111111111111
378282246310005|3782 822463 10005
"""


@table("text", cells(NUMBERS))
def test_numbers_of_telephones_cards_and_accounts_are_hidden(text):
    hidden = hide_personal(f"ecco {text} ciao")
    assert "[…]" in hidden and not re.search(r"\d{2}", hidden.replace("31/12/2024", ""))


HARMLESS = """
TriHard 7|alle 10:30 o 11:45|3-0 2-1|6-4 7-5 6-7 3-6 7-6|1914-1918|2010/2011|il 31/12/2024 alle 10
1234-5 87-42|2024-05-31 18:04|2013-03-26-205909|20240531|kernel 2.6.15-27-686|v10.0.1.218
192.168.100.200|10.0.0.0/24|91.189.88.31:80|costa 1.234.567,89|2 000 000|14.500 euro|1234567
1 2 3 4 5 6 7 8 9|11 22 33 44 55 66 77 88 99|3/4 o 5/6|1024x768|42949672960 bytes|$1234567890
Modeline 1280 1336 1472 1720 1024 1024 1026 1062|[17180697.916000]|[ 3108.204701]|0x00060329
9582879ff7f8570a87554c|user@host|@anna7|bugs.net/1234567890|https://x.it/1234567890
3.14159265358979|ports 6881-6999|bug 12345678|1280.1024|CVE-2014-0224|/dev/sda1 1 32 248832 83
1,234,567,890|password is wrong|a password for the wifi|error code 1603|the pin is bent
passport control|look at the dot com|key is F11|x.php?page=17&code=fr|codice fiscale|sk-learn
"""


@table("text", cells(HARMLESS))
def test_other_numbers_and_words_stay(text):
    assert hide_personal(f"ecco {text} ciao") == f"ecco {text} ciao"


ASKED = ["tel 12345678", "chiama il 12345678", "my number is 12345678", "whatsapp: 12345678"]


@table("text", ASKED)
def test_eight_digits_are_a_telephone_where_one_is_spoken_of(text):
    assert hide_personal(text) == text.replace("12345678", "[…]")


EMAILS = ["anna.rossi+x@example.co.uk", "ann.lee (at) example.com", "ann.lee[at]example[dot]com"]


@table("text", [*EMAILS, "ann.lee AT example DOT com", "anna chiocciola example punto it"])
def test_an_email_address_is_hidden_also_in_words(text):
    assert hide_personal(f"scrivi a {text}") == "scrivi a […]"


SECRETS = """
la password del wifi è #gatto123#|password: #gattonero#|pw #Hunter2!!#|wifi: #casa2020!#
contraseña: #perro2020#|mot de passe : #Soleil99#|Passwort lautet #Hund2024#|senha é #gato123#
Your code is #482913#|il codice di verifica è #482913#|codice di verifica #482913#|pin #4821#
il codice del portone è #4821#|PIN: #0000#|wifi: #12345678#|código: #482913#
#G-482913# is your verification code|passaporto #YA1234567#|passport no. #123456789#
codice fiscale #RSSMRA85T10A562S#|#sk-proj-abcdefghijklmnop1234567#|key #AKIAIOSFODNN7EXAMPLE#
#ghp_abcdefghijklmnopqrstuvwxyz0123456789#|#eyJhbGciOiJIUzI1.eyJzdWIiOiIx.SflKxwRJSM#
https://x.com/reset?token=#abcdef123#&x=1|https://x.com/#access_token=#abc123def#
"""


@table("text", cells(SECRETS))
def test_a_password_a_code_and_a_key_are_hidden_after_their_word(text):
    shown = re.sub("#[^#]*#$|#[^#]*#(?=[ &])", "[…]", text)
    plain = re.sub("#([^#]*)#$|#([^#]*)#(?=[ &])", r"\1\2", text)
    assert hide_personal(plain) == shown != plain


PRIVATE = [
    ("abito in via giuseppe verdi 3, sali", "via giuseppe verdi 3"),
    ("221 Baker Street", "221 Baker Street"),
    ("in der Hauptstraße 5", "straße 5"),
    ("la password è gattonero ok", "password è gattonero"),
    ("code 99", "code 99"),
    ("via con il vento", None),
    ("what a nice street", None),
    ("password: […]", None),
]


@table(("text", "found"), PRIVATE)
def test_what_may_be_private_is_found_for_a_person_to_read(text, found):
    assert looks_private(text) == found
