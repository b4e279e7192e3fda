"""Manual pages as prose: every construct that the Debian pages use, on small pages with known text."""

import pytest

from qscope.corpus_troff import join_lines, paragraphs


def test_only_the_prose_of_a_page_is_left():
    page = r"""
.\" a comment
.TH LS 1 "September 2022"
.de Vb
.nf
..
.ie \n(.g \{\
.  ds x y
hidden
.\}
.el .ds x z
.SH NAME
ls \- list files
.SH SYNOPSIS
.SY ls
.OP \-a
.YS
.SH
Headings on the next line
.PP
Lists the \fIfiles\fP of a folder,
as \fBls\fP(1) does. \" to be checked
.TP
\fB\-a\fR, \fB\-\-all\fR
shows all of them
.TP 4
.BR \-\-color = \fIWHEN\fR
.RI colors\  them , " and more"
.EX
ls \-a
.EE
.TS
a|b
.TE
After the table.
    an indented listing
.IP \(bu 2
The last one.
"""
    assert paragraphs(page) == [
        "ls - list files",
        "Lists the files of a folder, as ls(1) does.",
        "shows all of them",
        "colors them, and more",
        "After the table.",
        "The last one.",
    ]


def test_mdoc_pages_give_nothing():
    assert paragraphs(".Dd May 1\n.Dt LS 1\n.Sh NAME\nprose of a kind\n") == []


@pytest.mark.parametrize(
    "source, text",
    [
        (r"a\-b \(lqq\(rq \[em] \[u00E9] \[:u] \('e \(co", "a-b “q” — é ü é ©"),
        (r"\s-1small\s0 \fBbold\fP\f(CWcode\fR \m[blue]blue\m[]", "small boldcode blue"),
        (r"a\e\\b \&.c d\ e\~f\|g\:h\%i\cj", r"a\\b .c d e fghij"),
        (r"\*(lqx\*(rq \*[R] \*x", "“x” ®"),
        (r"w\h'2n'x\v'-1'y", "wxy"),
    ],
)
def test_escapes(source, text):
    assert paragraphs(f".PP\n{source}\n") == [text]


def test_macros_join_their_arguments_as_groff_does():
    page = '.B one "two three"\n.BR ls (1) ,\n.IR "a b" c\n.B\n.UR http://x\nlink\n.UE .\n'
    assert paragraphs(page) == ["one two three ls(1), a bc link."]


def test_definitions_and_ignored_text_end_where_they_say():
    assert paragraphs(".de XX YY\nnot this\n..\nnor this\n.YY\nthis\n.ig END\nnot\n.END\nand that\n") == [
        "this and that"
    ]


def test_wide_characters_are_joined_without_a_space():
    assert join_lines(["難以合", "作的人 ", "Debian", "の システム"]) == "難以合作的人 Debian の システム"
    assert join_lines(["one", "  two"]) == "one two"
    assert join_lines(["사용", "자"]) == "사용 자"
