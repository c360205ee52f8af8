"""Schemas of answers: what may be given, what servers are told, what is valid, and the dtypes of values."""

import datetime as dt
import enum
import json
import pickle
import uuid
from typing import Annotated, Any, Literal, Optional

import pandas as pd
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from swarmkit.errors import SettingError
from swarmkit.frames.typed import TEXT, typed_columns
from swarmkit.schema import Field, Schema


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Site(BaseModel):
    name: str
    depth: float | None = None


class Finding(BaseModel):
    """What a paper says."""

    model_config = ConfigDict(extra="forbid")
    gene: str = pydantic.Field(alias="geneName", description="HGNC symbol")
    colour: Colour
    n: Annotated[int, pydantic.Field(ge=0)] = 0
    sites: list[Site] = []
    seen: dt.date | None = None
    ident: uuid.UUID | None = None

    @pydantic.field_validator("gene")
    @classmethod
    def known(cls, gene: str) -> str:
        return {"BRCA1": gene, "TP53": gene}[gene]  # a KeyError, which pydantic does not expect


SIZE = {"w": int}


class Node(BaseModel):
    name: str
    child: Optional["Node"] = None


def columns(schema: Schema, *texts: str | None, **options: Any) -> pd.DataFrame:
    values = [None if t is None or schema.problem(t) else schema.values(t) for t in texts]
    return pd.DataFrame(typed_columns(schema, values, pd.RangeIndex(len(texts)), **options))


def sent(schema: Schema) -> dict[str, Any]:
    return schema.constraint["json"]


# ---- what may be given ---------------------


def test_fields_and_their_types():
    schema = Schema.of(
        {
            "tone": ["pos", "neg"],
            "n": int,
            "p": float | None,
            "ok": bool,
            "day": dt.date,
            "at": Optional[dt.datetime],  # noqa: UP045
            "tags": list[str],
            "kind": Literal["a", "b"],
            "site": {"name": str, "sizes": list[SIZE]},
        }
    )
    assert schema.fields == (
        Field("tone", "label", ("pos", "neg")),
        Field("n", "int"),
        Field("p", "float", (), True),
        Field("ok", "bool"),
        Field("day", "date"),
        Field("at", "datetime", (), True),
        Field("tags", "object"),
        Field("kind", "label", ("a", "b")),
        Field("site", "object"),
    )
    answer = {
        "site": {"sizes": [{"w": 2, "note": "?"}], "name": "x"},
        "kind": "b",
        "tags": ["s"],
        "day": "2024-01-31",
        "ok": True,
        "p": None,
        "n": 3,
        "tone": "neg",
        "more": 1,
    }
    text = json.dumps(answer)
    assert schema.problem(text) is None
    day = dt.date(2024, 1, 31)
    assert schema.values(text) == ("neg", 3, None, True, day, None, ["s"], "b", {"name": "x", "sizes": [{"w": 2}]})


def test_what_is_sent_is_closed_inlined_complete_and_in_order():
    described = sent(Schema.of({"z": str, "a": Site, "m": int | None}))
    assert json.dumps(described["properties"]["m"]) == '{"anyOf": [{"type": "integer"}, {"type": "null"}]}'
    assert list(described["properties"]) == described["required"] == ["z", "a", "m"]
    site = described["properties"]["a"]
    assert site == {
        "type": "object",
        "properties": {"name": {"type": "string"}, "depth": {"anyOf": [{"type": "number"}, {"type": "null"}]}},
        "required": ["name", "depth"],
        "additionalProperties": False,
    }
    text = json.dumps(sent(Schema.of(Finding)))
    assert [word in text for word in ("$ref", "$defs", "title", "HGNC symbol")] == [False, False, False, True]


def test_a_pydantic_model_validates_by_itself():
    schema = Schema.of(Finding)
    assert [(f.name, f.kind, f.optional) for f in schema.fields] == [
        *(("gene", "text", False), ("colour", "label", False), ("n", "int", False), ("sites", "object", False)),
        *(("seen", "date", True), ("ident", "text", True)),
    ]
    assert list(sent(schema)["properties"]) == ["geneName", "colour", "n", "sites", "seen", "ident"]
    ident = "12345678-1234-5678-1234-567812345678"
    text = json.dumps({"geneName": "TP53", "colour": "blue", "sites": [{"name": "s"}], "ident": ident})
    assert schema.values(text) == ("TP53", "blue", 0, [{"name": "s", "depth": None}], None, ident)
    assert schema.problem('{"geneName": "TP53", "colour": "blue", "x": 1}') == "x is no field that was asked for; got 1"
    assert schema.problem('{"geneName": "TP53", "colour": "blue", "n": -1}') == (
        "n must be greater than or equal to 0; got -1"
    )
    failed = "the model's own validation failed: KeyError: 'ABC'"
    assert schema.problem('{"geneName": "ABC", "colour": "blue"}') == failed
    assert Schema.of({"f": Finding}).problem('{"f": {"geneName": "ABC", "colour": "blue"}}') == failed


def test_alternatives_and_tuples_of_a_model():
    class Cat(BaseModel):
        kind: Literal["cat"]
        lives: int

    class Dog(BaseModel):
        kind: Literal["dog"]

    class Visit(BaseModel):
        pet: Cat | Dog = pydantic.Field(discriminator="kind")
        at: tuple[int, str]
        secs: dt.timedelta
        names: set[str]

    schema = Schema.of(Visit)
    assert {f.kind for f in schema.fields} == {"object"}
    assert '"oneOf"' not in json.dumps(sent(schema))
    answer = {"pet": {"kind": "cat", "lives": 7}, "at": [1, "x"], "secs": "PT5S", "names": ["a", "a"]}
    assert schema.values(json.dumps(answer)) == (answer["pet"], [1, "x"], dt.timedelta(seconds=5), ["a"])
    answer |= {"pet": {"kind": "cat", "lives": "x"}, "at": [1], "names": [2]}
    words = "pet.lives must be a whole number; got 'x'. at[1] is missing. names[0] must be a text; got 2"
    assert schema.problem(json.dumps(answer)) == words


def test_validators_of_a_model_cannot_break_a_column():
    class Odd(BaseModel):
        tone: Literal["pos", "neg"]
        n: int = 1

        @pydantic.model_validator(mode="after")
        def change(self) -> "Odd":
            self.tone = self.tone + "!" if self.n == 2 else self.tone
            self.n = True if self.n == 3 else self.n
            return self

    schema = Schema.of(Odd)
    assert schema.problem('{"tone": "pos"}') is None
    assert schema.problem('{"tone": "pos", "n": 2}') == "tone must be one of 'pos', 'neg'; got 'pos!'"
    assert schema.problem('{"tone": "pos", "n": 3}') == "n must be a whole number; got true"


def test_a_json_schema_is_validated_here_with_its_limits():
    schema = Schema.of(
        {
            "$defs": {"name": {"type": "string", "minLength": 2, "pattern": "^[A-Z]"}},
            "type": "object",
            "properties": {
                "gene": {"$ref": "#/$defs/name"},
                "n": {"type": "integer", "minimum": 1, "exclusiveMaximum": 10},
                "p": {"type": ["number", "null"], "multipleOf": 0.5},
                "tone": {"enum": ["pos", "neg", None]},
                "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 2},
                "free": {"type": "object"},
            },
            "required": ["gene", "n", "p", "tone", "tags"],
        }
    )
    assert [(f.kind, f.optional) for f in schema.fields] == [
        *(("text", False), ("int", False), ("float", True), ("label", True), ("object", False), ("object", True))
    ]
    assert sent(schema)["required"] == ["gene", "n", "p", "tone", "tags", "free"]
    assert {"type": "null"} in sent(schema)["properties"]["free"]["anyOf"]
    good = {"gene": "BRCA1", "n": 9, "p": 1.5, "tone": None, "tags": ["a"]}
    assert schema.values(json.dumps(good)) == ("BRCA1", 9, 1.5, None, ["a"], None)
    for wrong, words in [
        ({"gene": "B"}, "gene must have at least 2 characters; got 'B'"),
        ({"gene": "brca"}, "gene must match pattern '^[A-Z]'; got 'brca'"),
        ({"n": 10}, "n must be less than 10; got 10"),
        ({"n": 3.0}, "n must be a whole number; got 3.0"),
        ({"p": 0.3}, "p must be a multiple of 0.5; got 0.3"),
        ({"tone": "meh"}, "tone must be one of 'pos', 'neg'; got 'meh'"),
        ({"tags": ["a", "b", "c"]}, 'tags must have at most 2 items after validation, not 3; got ["a", "b", "c"]'),
        ({"free": [1]}, "free must be an object; got [1]"),
    ]:
        assert schema.problem(json.dumps({**good, **wrong})) == words


def test_a_dict_with_a_field_named_type_is_no_json_schema():
    assert Schema.of({"type": str, "properties": {"a": int}}).fields == (
        Field("type", "text"),
        Field("properties", "object"),
    )
    assert Schema.of({"type": ["a", "b"]}).fields == (Field("type", "label", ("a", "b")),)
    assert Schema.of({"properties": {"a": {"type": "string"}}}).fields == (Field("a", "text", (), True),)


def test_any_text_may_be_the_name_of_a_field():
    names = ["n samples", "_x", "model_dump", "class", "json", "f0", "é\n"]
    schema = Schema.of({**dict.fromkeys(names, int), "inner": {"a b": int}})
    answer = {**{name: i for i, name in enumerate(names)}, "inner": {"a b": 1}}
    assert schema.values(json.dumps(answer)) == (*range(len(names)), {"a b": 1})


def test_the_command_line_has_words_for_them():
    schema = Schema.parse("tone=pos|neg?, n=int,when=date,note=str?,tags=list[str]")
    same = {"tone": ["pos", "neg", None], "n": int, "when": dt.date, "note": str | None, "tags": list[str]}
    assert {schema: 1}[Schema.of(same)] == 1
    assert schema.key == Schema.of(same).key != Schema.of(dict(reversed(same.items()))).key
    assert Schema.parse("yes|no") == Schema.of(["yes", "no"])
    assert Schema.parse(" int ") == Schema.of(int)
    assert Schema.parse('{"type": "object", "properties": {"a": {"type": "integer"}}}').fields[0].kind == "int"


@pytest.mark.parametrize(
    "made",
    [
        Schema.of({"a": {"b": dt.date | None}, "t": ["x", "y"]}),
        Schema.of({"type": "object", "properties": {"a": {"type": "string"}}}),
        Schema.of(Finding),
        Schema.of(float),
        Schema.parse("when=date?,tone=a|b?"),
        Schema.regex("[a-z]+"),
        Schema.grammar('root ::= "a"'),
    ],
    ids=repr,
)
def test_schemas_travel_to_other_processes(made):
    arrived = pickle.loads(pickle.dumps(made))
    assert arrived == made
    assert arrived.fields == made.fields


# ---- lone values -----------------------------


@pytest.mark.parametrize(
    ("asked", "text", "value"),
    [
        (["pos", "neg"], " pos\n", "pos"),
        (["pos", "neg"], "POS.", "pos"),
        (["pos", "neg"], '"neg."', "neg"),
        (["a", "A"], "A", "A"),
        (["U.S.", "U.K."], "u.s.", "U.S."),
        (int, " -12.\n", -12),
        (int, "9" * 30, int("9" * 30)),
        (float, " 1e-3 ", 0.001),
        (float, "12.", 12.0),
        (bool, "Yes.", True),
        (bool, "FALSE", False),
        (Schema.regex("[A-Z]{2}"), " AB\n", "AB"),
        (Schema.regex(r"\s*x"), " x", " x"),
        (Schema.grammar("root ::= [a-z]+"), " any ", " any "),
    ],
)
def test_lone_answers(asked, text, value):
    schema = Schema.of(asked)
    assert schema.problem(text) is None
    assert schema.values(text) == (value,)
    assert [f.name for f in schema.fields] == [""]


@pytest.mark.parametrize(
    ("asked", "text", "words"),
    [
        (["pos", "neg"], "positive", "the answer must be one of 'pos', 'neg'; got 'positive'"),
        (["a", "A", "b"], "'a", "the answer must be one of 'a', 'A', 'b'; got \"'a\""),
        (["Pos", "POS"], "pos", "the answer must be one of 'Pos', 'POS'; got 'pos'"),
        (int, "twelve", "the answer must be a whole number; got 'twelve'"),
        (int, "12.5", "the answer must be a whole number; got '12.5'"),
        (int, "1_000", "the answer must be a whole number; got '1_000'"),
        (int, "٣", "the answer must be a whole number; got '٣'"),
        (int, "9" * 5000, f"the answer must be a whole number; got '{'9' * 60}' ..."),
        (float, "nan", "the answer must be a number; got 'nan'"),
        (float, "1e999", "the answer must be a number; got '1e999'"),
        (bool, "maybe", "the answer must be true or false; got 'maybe'"),
        (Schema.regex("[A-Z]{2}"), "ABC", "the answer must match '[A-Z]{2}'; got 'ABC'"),
    ],
)
def test_lone_answers_that_do_not_fit(asked, text, words):
    schema = Schema.of(asked)
    assert schema.problem(text) == words
    with pytest.raises(ValueError, match="the answer must"):
        schema.values(text)


# ---- answers ----------------------------------


@pytest.mark.parametrize(
    "text",
    [
        '\u00a0 {"n": 1}\n ',
        '```json\n{"n": 1}\n```',
        '```\n{"n": 1}',
        'Here it is:\n```json\n{"n": 1}\n```\nI hope it helps.',
        '```python\nprint(1)\n```\nSo:\n```json\n{"n": 1}\n```',
    ],
)
def test_white_space_and_a_fence_are_no_problem(text):
    schema = Schema.of({"n": int})
    assert schema.problem(text) is None
    assert schema.values(text) == (1,)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the answer is empty"),
        (" \n", "the answer is empty"),
        ('{"n": 1', "the answer is JSON that ends early"),
        ('```json\n{"n": 1', "the answer is JSON that ends early"),
        ('{"s": "```json\n{}```', "the answer is not JSON: control character (\\u0000-\\u001F) found"),
        ('The answer is {"n": 1}.', "the answer is not JSON: expected value at line 1 column 1; got 'The answer is {"),
        ('{"n": 1} {"n": 2}', "the answer is not JSON: trailing characters"),
        ('{"n": 1, "s": "\ud83d"}', "the answer has half of a surrogate pair"),
        ('{"n": 1, "s": "\\ud83d"}', "the answer is not JSON: unexpected end of hex escape"),
        ("[" * 5000, "the answer is not JSON: recursion limit exceeded"),
        ("[1]", "the answer must be an object; got [1]"),
        ("{}", "n is missing. s is missing. when is missing. And 1 more"),
        ('{"n": true, "s": 1, "when": "2024", "q": {"b": [1, "x"]}}',
         "n must be a whole number; got true. s must be a text; got 1. "
         "when must be a date such as 2024-01-31; got '2024'. And 1 more"),
        ('{"n": 1, "s": "x", "when": "2024-02-30", "q": {"b": []}}',
         "when must be a date such as 2024-01-31; got '2024-02-30'"),
        ('{"n": 1, "s": "x", "when": "2024-01-31", "q": {"b": [1, "x", 2.5]}}',
         "q.b[1] must be a whole number; got 'x'. q.b[2] must be"),
        ('{"n": 1, "s": "x", "when": "2024-01-31", "q": {"b": 5}}', "q.b must be a list; got 5"),
        ('{"n": 1, "s": "x", "when": "2024-01-31", "q": {}}', "q.b is missing"),
        ('{"n": 1, "s": "x", "when": "2024-01-31", "q": {"b": []}, "u": "?"}',
         "u must be a whole number or true or false; got '?'"),
        ('{"n": "\\u001b[2J' + "x" * 500 + '"}', "n must be a whole number; got '\\x1b[2Jxx"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_words(text, words):
    schema = Schema.of({"n": int, "s": str, "when": dt.date, "q": {"b": list[int]}, "u": int | bool | None})
    found = schema.problem(text)
    assert found is not None
    assert found.startswith(words)
    assert found.isprintable()
    assert len(found) < 300


def test_objects_are_not_shared_between_rows():
    schema, text = Schema.of({"tags": list[str]}), '{"tags": ["a"]}'
    assert schema.problem(text) is None
    assert schema.values(text)[0] is not schema.values(text)[0]


# ---- bad input ---------------------------------

CYCLE: dict[str, Any] = {"a": int}
CYCLE["b"] = CYCLE


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["a", "b", "a"], r"the label 'a' is there twice"),
        (["a"], r"labels must be two or more"),
        ([], r"labels must be two or more"),
        (["a", " "], r"a label must not be empty"),
        (["a", "b "], r"the label 'b ' has white space around it"),
        ([1, 2], r"labels must be texts; got 1, which may be written as '1'"),
        ({"tone": ["a", "a"]}, r"tone: the label 'a' is there twice"),
        ({"q": {"tone": Literal["a"]}}, r"q.tone: labels must be two or more"),
        (Node, r"child: it is recursive: #/\$defs/Node contains itself"),
        (CYCLE, r"it contains itself"),
        ({}, r"has no fields"),
        ({"q": {}}, r"q: has no fields"),
        ({1: int}, r"the name of a field must be a text; got 1"),
        ({"": int}, r"the name of a field must not be empty"),
        ({"n": complex}, r"n: <class 'complex'> is no type of a field; allowed are str, int, float"),
        ({"n": "int"}, r"n: 'int' is a text; give the type itself: int"),
        ({"n": dict[str, int]}, r"n: dict\[str, int\] is no type of a field"),
        ({"a": {"type": "string"}}, r"a: a JSON Schema among types"),
        (str, r"schema=<class 'str'>: must be a pydantic model, a JSON Schema"),
        ("tone=pos|neg", r"schema='tone=pos\|neg': must be a pydantic model"),
        (Site(name="x"), r"give the class, not an instance"),
        (pydantic.RootModel[list[int]], r"its top must be an object with properties; it is of type array"),
        ({"type": "array", "items": {"type": "string"}}, r"its top must be an object .*; it is of type array"),
        ({"type": "object"}, r"it is an object without properties"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, r"at its top: it is recursive: #/\$defs/a"),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}}, r"a.a: it is recursive: #"),
        ({"type": "object", "properties": {"a": {"$ref": "http://x/y"}}}, r"a: \$ref='http://x/y' is nothing within"),
        ({"type": "object", "properties": {"a": {"type": "list"}}}, r'a: \{"type": "list"\} is no type'),
        ({"type": "object", "properties": {"a": {"minimum": 1}}}, r"a: minimum without a type"),
        ({"type": "object", "properties": {"a": {"type": "integer", "minimum": "1"}}}, r"a: minimum='1' is no limit"),
        ({"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}}, r"a: pattern '\(' is no valid"),
        ({"type": "object", "properties": {"a": {"enum": ["x", "x"]}}}, r"a: a label of enum is there twice"),
        ({"type": "object", "properties": {"a": {"enum": ["x", ""]}}}, r"a: a label of enum must not be empty"),
        ({"type": "object", "properties": {"a": {"enum": [1.5]}}}, r"a: enum has 1.5"),
        ({"type": "object", "properties": {"a": {"enum": ["x", "yy"], "minLength": 2}}}, r"a: minLength beside enum"),
        ({"type": "object", "properties": {"a": {"type": "array", "items": [{}]}}}, r"a\[\]: must be a JSON Schema"),
        ({"type": "object", "properties": {"a": {"type": "object", "required": ["b"]}}}, r"a: required names b, not"),
        ({"type": "object", "properties": {"a": {}}, "required": [[]]}, r"required names \[\], not"),
        ({"type": "object", "properties": {"a": {}}, "required": ["b"]}, r"required names b, not among its properties"),
        ({"type": "object", "properties": {"a": {"nullable": True}}}, r"a: 'nullable' cannot be expressed"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_schema(wrong, words):
    with pytest.raises(SettingError, match=words):
        Schema.of(wrong)


@pytest.mark.parametrize("construct", ["oneOf", "allOf", "not", "patternProperties", "if"])
def test_constructs_that_cannot_be_expressed_are_named_with_their_place(construct):
    inner = {"type": "array", "items": {construct: [{"type": "string"}]}}
    with pytest.raises(SettingError, match=rf"q.tags\[\]: '{construct}' cannot be expressed; allowed are .*anyOf"):
        Schema.of({"type": "object", "properties": {"q": {"type": "object", "properties": {"tags": inner}}}})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "'' is no type; allowed are str, int"),
        ("n=integer", "n: 'integer' is no type; allowed are str, int"),
        ("n=int,n=str", "n is there twice"),
        ("n=int,", "'' is not name=type"),
        ("=int", "'=int' is not name=type"),
        ("tone=pos|", "tone: a label must not be empty"),
        ("{'a': 1}", "begins like JSON, and is none"),
    ],
)
def test_what_the_command_line_cannot_mean(text, words):
    with pytest.raises(SettingError, match=words):
        Schema.parse(text)


def test_patterns_and_grammars_are_texts():
    with pytest.raises(SettingError, match="no valid pattern: missing"):
        Schema.regex("(a")
    with pytest.raises(SettingError, match="must be a pattern"):
        Schema.regex("")
    with pytest.raises(SettingError, match="must be a grammar"):
        Schema.grammar(" ")


# ---- columns ------------------------------------

EACH = {
    "s": str | None,
    "n": int | None,
    "p": float | None,
    "ok": bool | None,
    "tone": ["neg", "pos", None],
    "day": dt.date | None,
    "at": dt.datetime | None,
    "tags": list[str] | None,
}
FULL = json.dumps(
    {
        "s": "é",
        "n": 2**53 + 1,
        "p": 1,
        "ok": False,
        "tone": "pos",
        "day": "0001-01-01",
        "at": "0001-01-01T00:00:00+05:00",
        "tags": ["a", "b"],
    }
)
DTYPES = [TEXT, "Int64", "Float64", "boolean", pd.CategoricalDtype(["neg", "pos"]), "datetime64[us]", "datetime64[us]"]


@pytest.mark.parametrize("texts", [[], [None], ["{}"], [FULL], [None, FULL, "{}", "no"]], ids=len)
def test_dtypes_depend_on_the_schema_alone(texts):
    frame = columns(Schema.of(EACH), *texts)
    for name, dtype in zip(EACH, [*DTYPES, object], strict=True):
        assert frame[name].dtype == dtype, name
        assert frame[name].isna().tolist() == [text != FULL for text in texts], name
    assert frame["tone"].cat.categories.tolist() == ["neg", "pos"]  # dtypes are equal in any order


def test_values_are_exact():
    row = columns(Schema.of(EACH), None, FULL).loc[1]
    assert row[["s", "n", "p", "ok", "tone", "tags"]].tolist() == ["é", 2**53 + 1, 1.0, False, "pos", ["a", "b"]]
    assert str(row["at"].to_datetime64()) == "0000-12-31T19:00:00.000000"  # before Python's calendar begins
    zoned = columns(Schema.of({"at": dt.datetime}), '{"at": "2024-01-31T12:00:00+02:00"}', '{"at": "2024-01-31 12:00"}')
    assert zoned["at"].tolist() == [pd.Timestamp("2024-01-31 10:00"), pd.Timestamp("2024-01-31 12:00")]


def test_whole_numbers_beyond_64_bits_stay_exact():
    for backend in ("numpy_nullable", "pyarrow"):
        found = columns(Schema.of(int), "1", str(2**63), None, dtype_backend=backend)[""]
        assert found.dtype == object
        assert found.tolist() == [1, 2**63, None]


def test_pyarrow_types():
    import pyarrow as pa

    kinds = [pa.string(), pa.int64(), pa.float64(), pa.bool_(), pa.dictionary(pa.int32(), pa.string())]
    kinds += [pa.date32(), pa.timestamp("us")]
    for texts in ([], [None], [None, FULL, "{}"]):
        frame = columns(Schema.of(EACH), *texts, dtype_backend="pyarrow")
        assert frame.dtypes.tolist() == [*map(pd.ArrowDtype, kinds), object]
        assert frame.isna().all(axis=1).tolist() == [text != FULL for text in texts]
    assert frame["tone"].array.__arrow_array__().combine_chunks().dictionary.to_pylist() == ["neg", "pos"]
    assert frame.loc[1, ["s", "n", "ok", "tone", "day"]].tolist() == ["é", 2**53 + 1, False, "pos", dt.date(1, 1, 1)]


def test_another_dtype_backend_is_refused():
    with pytest.raises(SettingError, match="dtype_backend='polars': must be 'numpy_nullable' or 'pyarrow'"):
        columns(Schema.of(int), dtype_backend="polars")


# ---- any schema, any answer ---------------------

TEXTS = st.text(st.characters(codec="utf-8"), max_size=8)
NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=6).filter(str.strip)
LABELS = st.lists(NAMES.map(str.strip), min_size=2, max_size=4, unique=True)
INTS = st.integers() | st.integers(-(2**70), 2**70)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
# type, the values it allows
SCALARS = st.one_of(
    *(st.just(x) for x in [(str, TEXTS), (int, INTS), (float, FLOATS), (bool, st.booleans()), (dt.date, st.dates())]),
    st.just((dt.datetime, st.datetimes(timezones=st.none() | st.just(dt.UTC)))),
    LABELS.map(lambda labels: (labels, st.sampled_from(labels))),
)


def nested(inner: Any) -> Any:
    return st.one_of(
        inner.map(lambda x: (list[x[0]], st.lists(x[1], max_size=3))),
        st.dictionaries(NAMES, inner, min_size=1, max_size=3).map(
            lambda d: ({n: x[0] for n, x in d.items()}, st.fixed_dictionaries({n: x[1] for n, x in d.items()}))
        ),
    )


def optional(field: Any) -> Any:
    type_, values = field
    return [*type_, None] if isinstance(type_, list) else type_ | None, st.none() | values


TYPES = SCALARS | SCALARS.map(optional) | st.recursive(SCALARS, nested, max_leaves=4)
FIELDS = st.dictionaries(NAMES, TYPES, min_size=1, max_size=4)


def as_json(value: Any) -> str:
    return json.dumps(value, default=lambda v: v.isoformat())


def seen(value: Any) -> Any:
    """A cell as a plain value."""
    if isinstance(value, pd.Timestamp):
        return value.to_pydatetime()
    return value if isinstance(value, (list, dict)) or not pd.isna(value) else None


def expected(value: Any) -> Any:
    if isinstance(value, dt.datetime):
        return value.replace(tzinfo=None)
    return dt.datetime(value.year, value.month, value.day) if isinstance(value, dt.date) else value


DTYPE_OF = {
    "text": TEXT,
    "int": "Int64",
    "float": "Float64",
    "bool": "boolean",
    "object": object,
    "date": "datetime64[us]",
    "datetime": "datetime64[us]",
}


def check_dtypes(schema: Schema, values: list[Any]) -> pd.DataFrame:
    frame = pd.DataFrame(typed_columns(schema, values, pd.RangeIndex(len(values))))
    for i, field in enumerate(schema.fields):
        numbers = [row[i] for row in values if row is not None and row[i] is not None]
        if field.kind == "int" and any(not -(2**63) <= v < 2**63 for v in numbers):
            assert frame[field.name].dtype == object
        elif field.kind == "label":
            assert frame[field.name].cat.categories.tolist() == list(field.labels)
        else:
            assert frame[field.name].dtype == DTYPE_OF[field.kind]
    return frame


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_valid_answers_arrive_on_their_rows(data):
    fields = data.draw(FIELDS)
    schema = Schema.of({name: type_ for name, (type_, _) in fields.items()})
    answers = data.draw(
        st.lists(st.none() | st.fixed_dictionaries({n: values for n, (_, values) in fields.items()}), max_size=4)
    )
    again = Schema.of(sent(schema))  # what is sent means the same
    assert again == schema
    rows: list[Any] = []
    for answer in answers:
        if answer is None:
            rows.append(None)
            continue
        shuffled = data.draw(st.permutations(list(answer.items())))
        text = as_json(dict(shuffled))
        assert schema.problem(text) is None
        rows.append(schema.values(text))
        assert again.values(text) == rows[-1]
        assert rows[-1] == tuple(answer[f.name] for f in schema.fields)
    frame = check_dtypes(schema, rows)
    for row, answer in enumerate(answers):
        for field in schema.fields:
            wanted = None if answer is None else answer[field.name]
            wanted = wanted if field.kind == "object" else expected(wanted)
            assert seen(frame[field.name].iloc[row]) == wanted


JUNK = st.sampled_from(
    ['"', "{", "}", "[", "]", ",", ":", "null", "1e999", "NaN", "\\", "```", "\ud83d", "\x00", "-", "9" * 25]
)


def damaged(text: str, change: tuple[str, int, int, str]) -> str:
    how, start, length, junk = change
    start = start % (len(text) + 1)
    match how:
        case "cut":
            return text[:start]
        case "delete":
            return text[:start] + text[start + length :]
        case "insert":
            return text[:start] + junk + text[start:]
    return f"```json\n{text}\n```"


CHANGES = st.tuples(st.sampled_from(["cut", "delete", "insert", "fence"]), st.integers(0, 200), st.integers(1, 9), JUNK)
ANY_JSON = st.recursive(
    st.none() | st.booleans() | INTS | FLOATS | TEXTS,
    lambda x: st.lists(x, max_size=3) | st.dictionaries(TEXTS, x, max_size=3),
)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_almost_json_never_breaks_anything(data):
    fields = data.draw(FIELDS)
    schema = Schema.of({name: type_ for name, (type_, _) in fields.items()})
    answer = data.draw(st.fixed_dictionaries({n: values | ANY_JSON for n, (_, values) in fields.items()}))
    text = as_json(answer)
    for change in data.draw(st.lists(CHANGES, max_size=2)):
        text = damaged(text, change)
    problem = schema.problem(text)
    if problem is None:
        check_dtypes(schema, [schema.values(text), None])
    else:
        assert problem.isprintable()
        assert 0 < len(problem) < 1000
        with pytest.raises(ValueError, match=r"."):
            schema.values(text)


WORDS = [
    *("type", "properties", "required", "items", "enum", "const", "anyOf", "oneOf", "$ref", "format", "title", "a"),
    *("minimum", "multipleOf", "minLength", "maxItems", "pattern", "additionalProperties", "description"),
]
ALMOST_NODES: Any = st.recursive(
    st.sampled_from(["string", "integer", "number", "object", "array", "null", "date", "#", "#/$defs/a", "(", "a"])
    | st.sampled_from([None, True, False, 1, 0.5, float("inf")]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4),
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(["a", "b"]), ALMOST_NODES, min_size=1), ALMOST_NODES)
def test_almost_json_schemas_are_schemas_or_refused(properties, definition):
    try:
        schema = Schema.of({"type": "object", "properties": properties, "$defs": {"a": definition}})
    except SettingError:
        return
    assert [f.name for f in schema.fields] == list(properties)
    assert pickle.loads(pickle.dumps(schema)) == schema
    for text in ("{}", '{"a": null, "b": 1}', '{"a": [{}, "x"], "b": {"a": 1}}'):
        values = None if schema.problem(text) else schema.values(text)
        check_dtypes(schema, [values])


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30) | st.from_regex(r"\s*[\"']?(pos|NEG|-?\d{1,3}(\.\d?)?|yes)[\"']?\.?\s*", fullmatch=True))
def test_lone_answers_never_break_anything(text):
    for schema in (Schema.of(["pos", "neg"]), Schema.of(int), Schema.of(float), Schema.of(bool), Schema.regex("a*")):
        if schema.problem(text) is None:
            check_dtypes(schema, [None, schema.values(text)])
