//! Files and parts of pages that a command writes, and compares where it is given `--check`.

use std::path::Path;

use crate::{cargo, reporting};

/// The lines around a part of a page, which is the command's.
fn marks(command: &str, part: &str) -> (String, String) {
    (format!("<!-- cargo xtask {command}: {part} -->\n"), format!("<!-- end of {part} -->\n"))
}

/// A page with one of its parts replaced.
pub(crate) fn with_part(page: &str, command: &str, part: &str, text: &str) -> crate::Result<String> {
    let (begin, end) = marks(command, part);
    let missing = |mark: &str| format!("the page has no line '{}'", mark.trim_end());
    let (before, rest) = page.split_once(&begin).ok_or_else(|| missing(&begin))?;
    let (_, after) = rest.split_once(&end).ok_or_else(|| missing(&end))?;
    Ok(format!("{before}{begin}\n{}\n\n{end}{after}", text.trim_end()))
}

/// Reads a file of the repository.
pub(crate) fn read(file: &str) -> crate::Result<String> {
    let path = cargo::root().join(file);
    std::fs::read_to_string(&path).map_err(|error| format!("{file} cannot be read: {error}").into())
}

/// Writes files of the repository that differ from this, or with `check` says so; whether all are as they
/// should be.
pub(crate) fn settle(files: &[(String, String)], command: &str, check: bool) -> crate::Result {
    let mut same = true;
    for (file, wanted) in files {
        let path = cargo::root().join(file);
        let there = if path.exists() { read(file)? } else { String::new() };
        if there == *wanted {
            println!("{file}: as it should be");
        } else if check {
            println!("{file}: {}; `cargo xtask {command}` writes it", difference(&there, wanted));
            same = false;
        } else {
            reporting::write(Path::new(&path), wanted)?;
            println!("{file}: written");
        }
    }
    Ok(same)
}

/// Where two texts begin to differ.
fn difference(there: &str, wanted: &str) -> String {
    if there.is_empty() {
        return "is missing".to_owned();
    }
    let end = "the end";
    let (mut there, mut wanted) = (there.lines(), wanted.lines());
    for number in 1.. {
        let (is, should) = (there.next(), wanted.next());
        if is != should {
            return format!("line {number} is '{}', to be '{}'", is.unwrap_or(end), should.unwrap_or(end));
        }
        if is.is_none() {
            break;
        }
    }
    "line ends differ".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: &str =
        "# A page\n\n<!-- cargo xtask count: numbers -->\n\nold\n\n<!-- end of numbers -->\n\nby hand\n";

    #[test]
    fn a_part_is_replaced_and_the_rest_stays() {
        let new = with_part(PAGE, "count", "numbers", "1\n2\n").unwrap();
        assert_eq!(new, PAGE.replace("old", "1\n2"));
        assert_eq!(with_part(&new, "count", "numbers", "1\n2\n").unwrap(), new);
    }

    #[test]
    fn a_page_without_the_marks_is_refused() {
        for (page, mark) in
            [("text", "<!-- cargo xtask count: a -->"), (PAGE, "<!-- cargo xtask count: a -->")]
        {
            let error = with_part(page, "count", "a", "").unwrap_err().to_string();
            assert!(error.contains(mark), "{error}");
        }
        let error = with_part("<!-- cargo xtask count: a -->\n", "count", "a", "").unwrap_err().to_string();
        assert!(error.contains("<!-- end of a -->"), "{error}");
    }

    #[test]
    fn the_first_difference_is_told() {
        assert_eq!(difference("a\nb\n", "a\nc\n"), "line 2 is 'b', to be 'c'");
        assert_eq!(difference("a\n", "a\nc\n"), "line 2 is 'the end', to be 'c'");
        assert_eq!(difference("", "a\n"), "is missing");
        assert_eq!(difference("a", "a\n"), "line ends differ");
    }
}
