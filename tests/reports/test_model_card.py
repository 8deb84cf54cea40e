"""The card of a super-network."""

from helpers import make_net

from stratavit.reports import model_card


def test_a_card_leaves_out_sizes_that_cannot_be_had(monkeypatch):
    monkeypatch.setattr(model_card, "SHARES", ("12/12", "0/12"))
    text = model_card.model_card(make_net("plain", stratified=True), "user/name")
    assert "| 12/12 |" in text
    assert "| 0/12 |" not in text
