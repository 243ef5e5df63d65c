//! The program as it is run: what it says where it cannot print.

#![cfg(target_os = "linux")]
#![allow(missing_docs)]

use std::fs::OpenOptions;
use std::process::{Command, Stdio};

/// What a command does whose output goes to a full disk: its exit code, and what it says.
fn on_a_full_disk(arguments: &[&str]) -> (Option<i32>, String) {
    let full = OpenOptions::new().write(true).open("/dev/full").expect("Linux has it");
    let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(arguments)
        .stdout(full)
        .stderr(Stdio::piped())
        .output()
        .expect("the program was built");
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn a_full_disk_is_an_error_and_no_panic() {
    for arguments in [
        &["explain", "--shape", "1,2,3,4,2,8"][..],
        &["explain", "--shape", "1,2,3,4,2,8", "--json"],
        &["conformance", "--list"],
        &["backends", "--check"],
    ] {
        let (code, said) = on_a_full_disk(arguments);
        assert_eq!(code, Some(2), "{arguments:?}: {said}");
        assert!(said.starts_with("error: standard output cannot be written: "), "{arguments:?}: {said}");
        assert!(!said.contains("panicked"), "{arguments:?}: {said}");
    }
}

#[test]
fn errors_that_cannot_be_printed_are_no_panic() {
    let full = || OpenOptions::new().write(true).open("/dev/full").expect("Linux has it");
    let status = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["explain", "--shape", "1,2,3,4,2,8"])
        .stdout(full())
        .stderr(full())
        .status()
        .expect("the program was built");
    assert_eq!(status.code(), Some(2));
}
