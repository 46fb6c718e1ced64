"""The paper's experiments repeated on this machine: runs, measurements, verdicts, and the page that tells them."""
