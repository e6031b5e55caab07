//! The files with keys, as somebody may have left them: the swarm key, and the node's identity.

#![no_main]

use std::cell::RefCell;
use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use darter_agent::swarm::identity::{Identity, to_core, to_libp2p};
use darter_agent::swarm::key;
use libfuzzer_sys::fuzz_target;

/// A file without a name: nothing is left behind.
struct Nameless(File);

impl Nameless {
    fn new() -> Self {
        // In memory where that can be had: a disk is a thousand times slower.
        let shm = PathBuf::from("/dev/shm");
        let dir = if shm.is_dir() { shm } else { std::env::temp_dir() };
        let path = dir.join(format!("darter-fuzz-key-files-{}", std::process::id()));
        let mut options = File::options();
        let file = options.read(true).write(true).create_new(true).open(&path).expect("a new file");
        std::fs::remove_file(&path).expect("it can be removed");
        Self(file)
    }

    fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.0.as_raw_fd()).into()
    }

    fn set(&self, bytes: &[u8]) {
        self.0.set_len(0).expect("it can be cut");
        self.0.write_all_at(bytes, 0).expect("it can be written");
    }
}

thread_local! {
    static FILE: RefCell<Nameless> = RefCell::new(Nameless::new());
}

fuzz_target!(|bytes: &[u8]| {
    FILE.with_borrow(|file| {
        let path = file.path();
        file.set(bytes);
        match Identity::load_or_make(&path) {
            Ok(identity) => {
                assert_eq!(bytes.len(), 32);
                let name = to_libp2p(identity.id()).expect("its own name");
                assert_eq!(to_core(&name), Some(identity.id()));
            }
            Err(error) => assert!(bytes.len() != 32 && error.to_string().contains("fd"), "{error}"),
        }
        assert_eq!(std::fs::read(&path).expect("it is still there"), bytes, "a broken identity is not replaced");
        if let Ok(key) = key::load(&path) {
            let text = std::str::from_utf8(bytes).expect("a key is text");
            let written = key.to_key_file();
            let digits = |text: &str| text.lines().nth(2).map(|line| line.trim_end().to_ascii_lowercase());
            assert_eq!(digits(text), digits(&written), "one key has one spelling");
            file.set(written.as_bytes());
            assert_eq!(key::load(&path).expect("what was written can be read").to_key_file(), written);
        }
    });
});
