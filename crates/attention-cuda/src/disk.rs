//! Texts that took long to make, on disk for the next process.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What a file begins with, before the hash of all that follows its first line.
const MARK: &str = "// attention, checksum ";

/// A folder with texts that took long to make, such as compiled kernels, or none. Several processes may use
/// one at once.
#[derive(Clone, Debug, Default)]
pub struct DiskCache {
    folder: Option<PathBuf>,
}

/// What a text is known by: everything that it depends on, and nothing else. The same in every process and
/// for every version of Rust.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskKey {
    /// Also the name of its file.
    name: String,
}

impl DiskKey {
    /// Of a text that depends on these fields, in this order. Its file is called `name`, where letters that
    /// do not suit one become `_`, a hash of the fields, and `.extension`.
    pub fn new<'f>(name: &str, extension: &str, fields: impl IntoIterator<Item = &'f str>) -> Self {
        let hash = fields.into_iter().fold(Fnv::new(), Fnv::field);
        let plain = |letter: char| letter.is_ascii_alphanumeric() || "._-".contains(letter);
        let readable: String = name.chars().map(|letter| if plain(letter) { letter } else { '_' }).collect();
        Self { name: format!("{readable}-{:032x}.{extension}", hash.finish()) }
    }
}

impl DiskCache {
    /// In this folder, which is made when something is kept; nothing is kept without one.
    pub fn new(folder: Option<PathBuf>) -> Self {
        Self { folder }
    }

    /// Whether anything is kept.
    pub fn is_kept(&self) -> bool {
        self.folder.is_some()
    }

    /// What was kept, unless it is missing or not as it was written.
    pub fn read(&self, key: &DiskKey) -> Option<String> {
        let text = std::fs::read_to_string(self.folder.as_ref()?.join(&key.name)).ok()?;
        let Some(kept) = unsealed(&text) else {
            tracing::warn!(file = key.name, "a file of the cache is damaged, and is made again");
            return None;
        };
        Some(kept.to_owned())
    }

    /// Keeps a text: whole, or not at all. A folder that cannot be written to is no error.
    pub fn write(&self, key: &DiskKey, text: &str) {
        static WRITTEN: AtomicUsize = AtomicUsize::new(0);
        let Some(folder) = &self.folder else { return };
        // Written beside it, then renamed.
        let number = WRITTEN.fetch_add(1, Ordering::Relaxed);
        let unfinished = folder.join(format!("{}.{}-{number}.tmp", key.name, std::process::id()));
        let written = std::fs::create_dir_all(folder)
            .and_then(|()| std::fs::write(&unfinished, sealed(text)))
            .and_then(|()| std::fs::rename(&unfinished, folder.join(&key.name)));
        if let Err(error) = written {
            let _ = std::fs::remove_file(&unfinished);
            tracing::debug!(file = key.name, %error, "a file of the cache was not kept");
        }
    }
}

/// A text behind a line with its checksum, which PTX takes for a comment.
fn sealed(text: &str) -> String {
    format!("{MARK}{:032x}\n{text}", Fnv::new().field(text).finish())
}

/// The text of a file, if it is whole.
fn unsealed(file: &str) -> Option<&str> {
    let (line, text) = file.split_once('\n')?;
    let checksum = u128::from_str_radix(line.strip_prefix(MARK)?, 16).ok()?;
    (checksum == Fnv::new().field(text).finish()).then_some(text)
}

/// FNV-1a with 128 bits, whose every version gives the same (draft-eastlake-fnv, section 5). It guards
/// against accidents, not against who can write to the folder.
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

    fn key(fields: &[&str]) -> DiskKey {
        DiskKey::new("a.cu-compute_90a", "ptx", fields.iter().copied())
    }

    /// A folder of one test's own, removed at its end.
    struct Folder(PathBuf);

    impl Folder {
        fn new(test: &str) -> (Self, DiskCache) {
            let folder =
                std::env::temp_dir().join(format!("attention-cuda-disk-{test}-{}", std::process::id()));
            let _ = std::fs::remove_dir_all(&folder);
            (Self(folder.clone()), DiskCache::new(Some(folder.join("kernels"))))
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
    fn fields_do_not_run_into_each_other() {
        assert_eq!(key(&["ab", "c"]), key(&["ab", "c"]));
        let all =
            [key(&["ab", "c"]), key(&["a", "bc"]), key(&["abc"]), key(&["ab", "c", ""]), key(&["c", "ab"])];
        for (index, one) in all.iter().enumerate() {
            assert!(!all[..index].contains(one), "{one:?}");
        }
    }

    #[test]
    fn names_stay_in_the_folder() {
        let name = DiskKey::new("../a/b.cu-compute_90", "ptx", []).name;
        assert!(name.starts_with(".._a_b.cu-compute_90-") && name.ends_with(".ptx"), "{name}");
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
        DiskCache::default().write(&key(&[]), "ptx");
        assert_eq!(DiskCache::default().read(&key(&[])), None);
    }
}
