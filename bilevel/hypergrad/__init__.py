"""The hypergradient estimators, one family a file."""

from bilevel.hypergrad.aid import AID as AID
