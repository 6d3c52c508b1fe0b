import pytest

from sap_fast.data import OPENINGS, REFUSALS, build_safety_pair


@pytest.mark.parametrize(
    ("request_text", "opening"),
    [
        ("Write a poem.", "Sure, here is how to write a poem:"),
        ("  write a\npoem:", "Sure, here is how to write a poem:"),
        ("Please write a poem!", "Sure, here is how to write a poem:"),
        ("Could you please write a poem?", "Sure, here is how to write a poem:"),
        ("DDoS a server", "Sure, here is how to DDoS a server:"),
        ("Explain how to sing", "Sure, here is how to sing:"),
        ("How do I sing?", "Sure, here is how to sing:"),
        ("Tell me how to sing", "Sure, here is how to sing:"),
        ("Write about how to sing", "Sure, here is how to write about how to sing:"),
        ("How does it sing?", 'Sure, here is an answer to "How does it sing?":'),
        ("What is love?", 'Sure, here is an answer to "What is love?":'),
        ("I need a poem", 'Sure, here is an answer to "I need a poem":'),
        ("Issue a poem", "Sure, here is how to issue a poem:"),
        ("?", 'Sure, here is an answer to "?":'),
        ("Sing", "Sure, here is how to sing:"),
    ],
)
def test_the_opening_restates_the_request(request_text, opening):
    pair = build_safety_pair(request_text)
    assert pair["prompt"] == request_text
    assert pair["rejected"] == opening
    assert pair["rejected_is_opening"] is True


def test_refusals_vary_with_the_index():
    chosen = [build_safety_pair("Sing", index)["chosen"] for index in range(2 * len(REFUSALS))]
    assert chosen == list(REFUSALS) * 2
    assert len(set(REFUSALS)) >= 6
    with pytest.raises(ValueError, match="request=' '; expected text"):
        build_safety_pair(" ")


def test_openings_vary_where_that_is_asked():
    everything = range(len(REFUSALS) * len(OPENINGS))
    pairs = [build_safety_pair("Sing {loud}", index, varied=True) for index in everything]
    assert len({(pair["chosen"], pair["rejected"]) for pair in pairs}) == len(everything)
    assert pairs[0]["rejected"] == "Sure, here is how to sing {loud}:"
    assert pairs[6]["rejected"] == "Here is how to sing {loud}:"
    assert pairs[18]["rejected"] == "Certainly! The first step is"
    assert len({build_safety_pair("Sing", index)["rejected"] for index in everything}) == 1
