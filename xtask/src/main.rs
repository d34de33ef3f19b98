//! Set-up, test, bench and soak commands.
fn main() {}
