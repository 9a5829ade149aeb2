"""The pure verifiers that the policies share: parse, evaluate and format apart; no policy, no network."""
