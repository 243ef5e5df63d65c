//! Compiled sources on disk.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use attention_kernels::Source;

use crate::nvrtc::options;

/// What a file begins with, before the hash of all that follows its first line.
const MARK: &str = "// attention, checksum ";

/// A folder with compiled sources, or none.
#[derive(Debug, Default)]
pub(crate) struct Disk {
    pub(crate) folder: Option<PathBuf>,
}

/// What a compiled source is known by: everything that its PTX depends on, and nothing else. The same in every process
/// and for every version of Rust.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Key {
    /// Also the name of its file.
    name: String,
}

impl Key {
    pub(crate) fn new(source: &Source, arch: &str, defines: &[&str], nvrtc: (i32, i32)) -> Self {
        let (major, minor) = nvrtc;
        let mut hash = Fnv::new().field(source.text).field(&format!("nvrtc {major}.{minor}"));
        for option in options(arch, defines) {
            hash = hash.field(&option);
        }
        let plain = |letter: char| letter.is_ascii_alphanumeric() || "._-".contains(letter);
        let readable: String = (source.name.chars().chain(['-']).chain(arch.chars()))
            .map(|letter| if plain(letter) { letter } else { '_' })
            .collect();
        Self { name: format!("{readable}-{:032x}.ptx", hash.finish()) }
    }
}

impl Disk {
    /// What was kept, unless it is missing or not as it was written.
    pub(crate) fn read(&self, key: &Key) -> Option<String> {
        let text = std::fs::read_to_string(self.folder.as_ref()?.join(&key.name)).ok()?;
        let Some(ptx) = unsealed(&text) else {
            tracing::warn!(file = key.name, "a compiled kernel is damaged on disk, and is compiled again");
            return None;
        };
        Some(ptx.to_owned())
    }

    /// Keeps PTX. A folder that cannot be written to is no error.
    pub(crate) fn write(&self, key: &Key, ptx: &str) {
        static WRITTEN: AtomicUsize = AtomicUsize::new(0);
        let Some(folder) = &self.folder else { return };
        // Whole or not at all: written beside it, then renamed.
        let number = WRITTEN.fetch_add(1, Ordering::Relaxed);
        let unfinished = folder.join(format!("{}.{}-{number}.tmp", key.name, std::process::id()));
        let written = std::fs::create_dir_all(folder)
            .and_then(|()| std::fs::write(&unfinished, sealed(ptx)))
            .and_then(|()| std::fs::rename(&unfinished, folder.join(&key.name)));
        if let Err(error) = written {
            let _ = std::fs::remove_file(&unfinished);
            tracing::debug!(file = key.name, %error, "a compiled kernel was not kept");
        }
    }
}

/// PTX behind a line with its checksum, which PTX takes for a comment.
fn sealed(ptx: &str) -> String {
    format!("{MARK}{:032x}\n{ptx}", Fnv::new().field(ptx).finish())
}

/// The PTX of a file, if it is whole.
fn unsealed(text: &str) -> Option<&str> {
    let (line, ptx) = text.split_once('\n')?;
    let checksum = u128::from_str_radix(line.strip_prefix(MARK)?, 16).ok()?;
    (checksum == Fnv::new().field(ptx).finish()).then_some(ptx)
}

/// FNV-1a with 128 bits, whose every version gives the same (draft-eastlake-fnv, section 5). It guards against
/// accidents, not against who can write to the folder.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fnv(u128);

impl Fnv {
    pub(crate) fn new() -> Self {
        Self(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d)
    }

    /// A text and its length, so that two fields never read as two others.
    pub(crate) fn field(self, text: &str) -> Self {
        self.bytes(text.as_bytes()).bytes(&(text.len() as u64).to_le_bytes())
    }

    pub(crate) fn finish(self) -> u128 {
        self.0
    }

    fn bytes(self, bytes: &[u8]) -> Self {
        const PRIME: u128 = (1 << 88) + 0x13b;
        Self(bytes.iter().fold(self.0, |hash, &byte| (hash ^ u128::from(byte)).wrapping_mul(PRIME)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: Source =
        Source { name: "a.cu", text: "text of a", entry_points: &["a"], variants: &[&[], &["HEAD_DIM=64"]] };

    fn key(defines: &[&str]) -> Key {
        Key::new(&SOURCE, "compute_90a", defines, (13, 0))
    }

    /// A folder of one test's own, removed at its end.
    struct Folder(PathBuf);

    impl Folder {
        fn new(test: &str) -> (Self, Disk) {
            let folder =
                std::env::temp_dir().join(format!("attention-cuda-disk-{test}-{}", std::process::id()));
            let _ = std::fs::remove_dir_all(&folder);
            (Self(folder.clone()), Disk { folder: Some(folder.join("kernels")) })
        }

        /// The one file that is kept.
        fn file(&self) -> PathBuf {
            let mut files = std::fs::read_dir(self.0.join("kernels")).expect("the folder");
            let file = files.next().expect("a file").expect("a file").path();
            assert!(files.next().is_none(), "more than one file");
            file
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn the_hash_is_the_published_one() {
        // Of the reference implementation's test vectors.
        let hash = |text: &str| Fnv::new().bytes(text.as_bytes()).finish();
        assert_eq!(hash(""), 0x6c62272e07bb014262b821756295c58d);
        assert_eq!(hash("a"), 0xd228cb696f1a8caf78912b704e4a8964);
        assert_eq!(hash("foobar"), 0x343e1662793c64bf6f0d3597ba446f18);
    }

    #[test]
    fn the_key_is_all_that_ptx_depends_on() {
        let first = key(&[]);
        assert_eq!(first, key(&[]));
        let others = [
            key(&["HEAD_DIM=64"]),
            key(&["HEAD_DIM=128"]),
            key(&["HEAD_DIM=64", "CAUSAL"]),
            Key::new(&SOURCE, "compute_90", &[], (13, 0)),
            Key::new(&SOURCE, "compute_90a", &[], (13, 1)),
            Key::new(&SOURCE, "compute_90a", &[], (12, 8)),
            Key::new(&Source { text: "another text", ..SOURCE }, "compute_90a", &[], (13, 0)),
        ];
        for (index, other) in others.iter().enumerate() {
            assert_ne!(&first, other);
            assert!(!others[..index].contains(other), "{other:?}");
        }
        // Neither the entry points nor the list of variants change the text that is compiled.
        assert_eq!(first, Key::new(&Source { variants: &[], ..SOURCE }, "compute_90a", &[], (13, 0)));
    }

    #[test]
    fn the_key_is_stable() {
        // Computed apart from this code. A change makes every user compile anew.
        assert_eq!(key(&["HEAD_DIM=64"]).name, "a.cu-compute_90a-1ecbd05ce4033827d728e6a3aaf7c566.ptx");
    }

    #[test]
    fn names_stay_in_the_folder() {
        let name = Key::new(&Source { name: "../a/b.cu", ..SOURCE }, "compute_90", &[], (13, 0)).name;
        assert!(name.starts_with(".._a_b.cu-compute_90-"), "{name}");
    }

    #[test]
    fn what_was_written_is_read() {
        let (folder, disk) = Folder::new("read");
        assert_eq!(disk.read(&key(&[])), None);
        disk.write(&key(&[]), ".version 9.0\n");
        assert_eq!(disk.read(&key(&[])).as_deref(), Some(".version 9.0\n"));
        assert_eq!(disk.read(&key(&["HEAD_DIM=64"])), None);
        let text = std::fs::read_to_string(folder.file()).expect("the file");
        assert!(text.starts_with("// ") && text.ends_with("\n.version 9.0\n"), "{text}");
    }

    #[test]
    fn what_is_damaged_is_not_read_and_is_overwritten() {
        let (folder, disk) = Folder::new("damaged");
        disk.write(&key(&[]), ".version 9.0\n.entry a");
        let file = folder.file();
        let whole = std::fs::read(&file).expect("the file");
        for damaged in
            [&b""[..], &whole[..4], &whole[..whole.len() - 1], b"// attention, checksum \n", b"\xff\n"]
        {
            std::fs::write(&file, damaged).expect("it can be written");
            assert_eq!(disk.read(&key(&[])), None, "{}", String::from_utf8_lossy(damaged));
        }
        disk.write(&key(&[]), ".version 9.1");
        assert_eq!(disk.read(&key(&[])).as_deref(), Some(".version 9.1"));
        assert_eq!(folder.file(), file, "no other file is left");
    }

    #[test]
    fn a_folder_that_cannot_be_is_no_error() {
        let (folder, disk) = Folder::new("impossible");
        std::fs::write(&folder.0, "a file where the folder's parent should be").expect("it can be written");
        disk.write(&key(&[]), "ptx");
        assert_eq!(disk.read(&key(&[])), None);
        std::fs::remove_file(&folder.0).expect("cleaned up");
        Disk::default().write(&key(&[]), "ptx");
        assert_eq!(Disk::default().read(&key(&[])), None);
    }
}
