"""Images restored by proximal algorithms of which something is learned, one experiment a file."""

from bilevel.problems.imaging.deblurring import Deblurring as Deblurring, deblurring as deblurring
