//! What is done with this repository, one file a command: `cargo xtask --help`.

/// Prints a line, as that of the standard library does, which panics where the reader has gone away
/// (`| head`) or the disk is full; this ends the command.
macro_rules! println {
    () => { $crate::reporting::print_line(format_args!("")) };
    ($($arguments:tt)*) => { $crate::reporting::print_line(format_args!($($arguments)*)) };
}

/// As [`println!`] of this crate, to standard error.
macro_rules! eprintln {
    ($($arguments:tt)*) => { $crate::reporting::print_error_line(format_args!($($arguments)*)) };
}

mod auto;
mod backends;
mod bench;
mod candle_features;
mod capabilities;
mod cargo;
mod check;
mod circles;
mod conformance;
mod dependencies;
mod exchange;
mod explain;
mod features;
mod fuzz;
mod generated;
mod golden;
mod graphs;
mod kernels;
mod machine;
mod members;
mod outcome;
mod packages;
mod reporting;
mod sanitize;
mod test;
mod unsafe_sites;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

pub(crate) use outcome::Result;

/// Checks, tests and measures this repository.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Check(check::Arguments),
    Test(test::Arguments),
    Features(features::Arguments),
    Backends(capabilities::Arguments),
    Conformance(conformance::Arguments),
    Exchange(exchange::Arguments),
    Explain(Box<explain::Arguments>),
    Fuzz(fuzz::Arguments),
    Golden(golden::Arguments),
    Graphs(graphs::Arguments),
    Kernels(kernels::Arguments),
    Bench(bench::Arguments),
    Unsafe(unsafe_sites::Arguments),
    Sanitize(sanitize::Arguments),
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Check(arguments) => check::run(&arguments),
        Command::Test(arguments) => test::run(&arguments),
        Command::Features(arguments) => features::run(&arguments),
        Command::Backends(arguments) => capabilities::run(&arguments),
        Command::Conformance(arguments) => conformance::run(&arguments),
        Command::Exchange(arguments) => exchange::run(&arguments),
        Command::Explain(arguments) => explain::run(&arguments),
        Command::Fuzz(arguments) => fuzz::run(&arguments),
        Command::Golden(arguments) => golden::run(&arguments),
        Command::Graphs(arguments) => graphs::run(&arguments),
        Command::Kernels(arguments) => kernels::run(&arguments),
        Command::Bench(arguments) => bench::run(&arguments),
        Command::Unsafe(arguments) => unsafe_sites::run(&arguments),
        Command::Sanitize(arguments) => sanitize::run(&arguments),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn options_are_as_the_readme_names_them() {
        for line in [
            "check --allow-dirty",
            "test",
            "features",
            "features --test",
            "backends --check",
            "conformance --backend cpu --dtype f32 --dtype bf16 --pass backward --filter causal --list",
            "conformance --json a.json --html a.html --threads 1,4",
            "exchange --python python3",
            "explain --shape 1,2,3,4,2,8 --dtype bf16 --causal --device h200@9.19 --json",
            "fuzz --seconds 60 --seed 7 --seeds 100 --backend chunked --level avx2 --threads 1,2 --jobs 1",
            "golden --dir a --dir b --backend cpu --dtype f64",
            "golden --check",
            "graphs --wheels a --dtype bf16 --filter mask/ --all",
            "kernels",
            "kernels --arch sm_80 --arch sm_90a,sm_100 --wheel-root a --require",
            "bench --shape 1,2,3,4,2,8 --shape 1,2,3,4,2,8,5 --dtype f32 --pass both --causal --mask bias",
            "bench --peer torch --peer jax --peer-path math --threads 2 --repeats 3 --json a --record b",
            "sanitize --seeds 10 --suite",
            "bench --plot --check",
            "bench --quick --peer-python python3",
            "unsafe --check",
        ] {
            let words = ["cargo xtask"].into_iter().chain(line.split(' '));
            if let Err(error) = Cli::try_parse_from(words) {
                panic!("{line}: {error}");
            }
        }
    }

    #[test]
    fn wrong_options_are_refused() {
        for (line, what) in [
            ("conformance --dtype int8", "unknown dtype 'int8'; possible are f64, f32, f16, bf16"),
            ("conformance --dtype f8e4m3", "f8e4m3"),
            ("conformance --pass both", "unknown pass 'both'"),
            ("bench --pass backward", "unknown pass 'backward'"),
            ("bench --shape 1,2", "has 2 sizes"),
            ("golden --check --dir a", "cannot be used with"),
        ] {
            let words = ["cargo xtask"].into_iter().chain(line.split(' '));
            let error = Cli::try_parse_from(words).err().expect(line).to_string();
            assert!(error.contains(what), "{line}: {error}");
        }
    }
}
