pub(crate) fn lacks() -> Option<String> { Some("not yet".to_owned()) }
