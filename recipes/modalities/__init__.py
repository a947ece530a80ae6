"""Up to six views of one thing, brought together by contrast."""
