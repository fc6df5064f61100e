//! The escape key of `spore-vmm run --console`.

/// Ctrl-A.
const ESCAPE: u8 = 1;

/// What the user meant.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Typed {
    /// For the guest.
    Bytes(Vec<u8>),
    PowerButton,
    Quit,
}

/// Splits typed bytes; an escape may fall between two reads.
#[derive(Debug, Default)]
pub(super) struct Keys {
    escaped: bool,
}

impl Keys {
    pub(super) fn feed(&mut self, data: &[u8]) -> Vec<Typed> {
        let mut typed = Vec::new();
        let mut bytes = Vec::new();
        for &byte in data {
            if !self.escaped {
                if byte == ESCAPE {
                    self.escaped = true;
                } else {
                    bytes.push(byte);
                }
                continue;
            }
            self.escaped = false;
            match byte {
                b'x' | b'p' => {
                    if !bytes.is_empty() {
                        typed.push(Typed::Bytes(std::mem::take(&mut bytes)));
                    }
                    typed.push(if byte == b'x' { Typed::Quit } else { Typed::PowerButton });
                }
                ESCAPE | b'a' => bytes.push(ESCAPE),
                // Not a command: the guest gets both keys.
                other => bytes.extend([ESCAPE, other]),
            }
        }
        if !bytes.is_empty() {
            typed.push(Typed::Bytes(bytes));
        }
        typed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(data: &[u8]) -> Typed {
        Typed::Bytes(data.to_vec())
    }

    #[test]
    fn commands_are_split_from_text() {
        assert_eq!(Keys::default().feed(b"ls\r"), [bytes(b"ls\r")]);
        assert_eq!(Keys::default().feed(b"a\x01xb"), [bytes(b"a"), Typed::Quit, bytes(b"b")]);
        assert_eq!(Keys::default().feed(b"\x01p"), [Typed::PowerButton]);
        assert_eq!(Keys::default().feed(b"\x01\x01\x01a\x01q"), [bytes(b"\x01\x01\x01q")]);
    }

    #[test]
    fn an_escape_may_be_split_over_reads() {
        let mut keys = Keys::default();
        assert_eq!(keys.feed(b"\x01"), []);
        assert_eq!(keys.feed(b"x"), [Typed::Quit]);
        assert_eq!(keys.feed(b"x"), [bytes(b"x")]);
    }
}
