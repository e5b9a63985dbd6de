"""Changes that make no difference, each with one sentence that says why no test should, or could, detect it.

A rule has a pattern for "file function" and a pattern for the changed lines, "- before" and "+ after", one line each.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    where: str                              # in "minidiff/engine/ops.py div"
    change: str                             # in "- line before\n+ line after"
    why: str


ANYWHERE = ""

RULES = [
    # ---- the same by NumPy's own rules
    Rule(ANYWHERE, r"reshape\(.*-1.*\n\+ .*reshape\(.*-2",
         "NumPy's reshape finds the length of any negative axis, -2 as well as -1."),
    Rule(ANYWHERE, r"astype\(.*copy=False.*\n\+ .*(copy=(None|True)|, \))",
         "A copy, or none, of the same numbers: memory and speed only."),
    Rule(ANYWHERE, r"zip\(.*strict=(True|False).*\n\+ .*(strict=(None|True|False)|, \))|^- strict=True,\n",
         "Both lists have the same length by construction; strict= guards against later edits."),
    Rule(ANYWHERE, r"\+ .*einsum\(\"[A-Z,]+->[A-Z]+\"", "The letters of einsum are only names."),
    Rule("_unbroadcast", r"keepdims=True\).*\n\+ .*(, |keepdims=(False|None))\)\.reshape",
         "The reshape that follows gives the axes back."),
    Rule("scaled_dot_product", r"isfinite\(top\), top, 1\)",
         "Where no score is finite all are -inf, and -inf less 1 is -inf less 0."),
    Rule(ANYWHERE, r'kind not in "XX[a-zA-Z]+XX"', "A dtype's kind is one letter, and no kind is X."),
    Rule("add_product", r'no.*b"n"', "BLAS treats N and n alike."),

    Rule(ANYWHERE, r'order="f"|order=.* else "c"', "NumPy reads the order of an array in upper and lower case."),
    Rule(ANYWHERE, r"decode\(.*\n\+ .*\"UTF-(8|16|8-SIG)\"",
         "Python reads the name of an encoding in upper and lower case."),
    Rule(ANYWHERE, r"integers\(0, (.*)\n\+ .*integers\(\1", "NumPy draws from 0 where no lower end is given."),
    Rule(ANYWHERE, r"User-Agent", "The name of the program in a request, in upper or lower case."),
    Rule("emoji.py over|fitting.py eight_bits", r"astype\(None\)", "float64 holds these whole numbers exactly."),
    Rule("emoji.py over|fitting.py eight_bits", r"// (\d+).*\n\+ .* / \1",
         "Conversion to uint8 cuts what follows the point."),
    Rule("fitting.py eight_bits", r"clip\((1, 65535|0, 65536)\)", "The nearest value of 8 bits is the same."),
    Rule("of_csv|read_names", r"newline=None", "Only line breaks within a cell differ, and a caption has none."),
    Rule("of_csv", r"(FILE|TEXT)_COLUMNS\[0\].*\n\+ .*\1_COLUMNS\[1\]",
         "Each of these names of a column means the same."),
    Rule("swiss_roll.py points", r"curve - noise", "Noise is as likely as its negative."),
    Rule("swiss_roll.py log_prob", r"range\(0, len\(x\), \)", "In smaller parts: memory and speed only."),
    Rule("TextEncoder.__init__", r"rng, std=1\.0\).*\n\+ .*rng, \)", "The default is the same number."),
    Rule("kl_gaussian", r"var2, 1\.0\).*\n\+ .*var2, 2\.0\)", "The number stands for its kind, a Python float."),
    Rule("GaussianDenoiser.__init__", r"np\.asarray\(mean, (None)?\), np\.asarray\(cov, np\.float64\)",
         "The mean is combined with float64 arrays wherever it is used."),
    Rule("MixtureDenoiser", r"\+ (np|xp)\.zeros.*\n\+ .* - (np|xp)\.zeros", "Zeros may be added or subtracted."),
    Rule("samplers.py sample", r"maxlen", "All states are kept instead of the last one: memory only."),
    Rule("dpm_solver_pp_2m", r"h = -math.*\n\+ h = \+math", "Only the quotient of two h is used: their sign cancels."),
    Rule(ANYWHERE, r"np\.float64\).*\n\+ .*(astype|normal\(\(\), ?)\(?None\)",
         "NumPy reads the dtype None as float64."),
    Rule("_rows", r"\(len\(a\) == B\) and False", "Broadcasting an array to its own shape changes nothing."),

    Rule(ANYWHERE, r"slice\(0, (.*)\n\+ .*slice\((None, )?\1", "A slice begins at 0 where nothing is said."),
    Rule("_distances", r'"SQEUCLIDEAN"', "SciPy reads the name of a distance in upper and lower case."),
    Rule("_distances", r'b, "sqeuclidean"\).*\n\+ .*b, \)', "Distances are compared with distances, squared or not."),

    Rule(r"systems/.*\.stages", r"pictures\.(sheet|strip)\(.*columns=\d.*\n\+ .*(columns=(None|\d+)|, \)|, title)",
         "A preview in another number of columns: its pictures and their captions are the same."),

    Rule("attributes.py _measure_chunk", r"\+ u, v = u \+ mean\(u\)|\+ v, u = \(row [+-] \d\.5\) / 2, \(column [+-] ",
         "The origins of u and v cancel: v is centred, and a width is a difference."),
    Rule("attributes.py _measure_chunk", r"np\.pad\(.*\n\+ .*np\.pad\(big >= INK, \(\([01], [01]\), \([12], [12]\), ",
         "More points without ink around, or behind, the images."),
    Rule("attributes.py _measure_chunk", r"astype\(None\)", "In float64: more exact, and slower."),
    Rule("_with_article", r"XXaeiou8XX", "No phrase begins with X."),
    Rule("fitting.py opaque", r"background, 256\)", "Pillow takes 256 for 255."),
    Rule("_InTime.read", r"thread_time\(\) >= self\.end", "The clock never shows exactly the end."),
    Rule("mnist.py pack", r"\), 9, mtime=0\).*\n\+ .*\), (None, |10, )?mtime=0\)", "gzip's own default is 9."),
    Rule("Parser.parse_args", r"parse_known_args\(words, (None)?\)", "No caller gives a namespace."),
    Rule("own_pictures.py read", r"source, None, options", "The hash is computed again: time only."),
    Rule("picture_cache.py decoded", r"suffix=|prefix=|temporary = \"\"", "Another name of a temporary folder."),
    Rule("picture_cache.py key", r":33\]", "The length of a name."),
    Rule("picture_cache.py write", r"read\(None\)", "All at once: memory only."),
    Rule("picture_cache.py opened", r"memmap\(path, mode", "uint8 is memmap's own default."),
    Rule("file_digest", r'"SHA256"', "hashlib reads the name of a hash in upper and lower case."),
    Rule("picture_cache.py opened", r"\+ .* np\.zeros\(shape, (None)?\)",
         "The dtype of no pictures: a folder without any is refused."),
    Rule("digit_captions.py", r"(form|random\(\)) (>=|<) (0\.\d+|keep).*\n\+ .*(form|random\(\)) (>|<=) (0\.\d+|keep)",
         "A uniform number is never exactly the bound."),

    Rule(r"cli/\w+\.py add", r'- ((?:.*help=)?")(.*)\n\+ \1(?i:\2)$', "Upper and lower case in a help text."),
    Rule(ANYWHERE, r'- (.*")([^"]*[a-z]+ [a-z]+[^"]*)(".*)\n\+ \1(?!\2")(?i:\2)\3$',
         "Upper and lower case in a sentence."),
    Rule(r"cli/\w+\.py add", r'- (.*)metavar="[^"]*"(?:, )?(.*)\n\+ \1(?:metavar=(?:"[^"]*"|None)(?:, )?)?\2$',
         "The word that stands for a value in a help text."),

    # ---- the same numbers, with more work
    Rule("minidiff/engine/", r"requires_grad\) or True else None",
         "A cotangent is computed that `record` drops: speed only (tests hold it for the ops where it costs most)."),
    Rule("parallel_map", r"cores\(\) == 1",
         "Whether one thread or a pool computes it, the results are the same: speed only."),
    Rule("parallel_map", r"user_api", "OpenMP, if present, is also limited to one thread: speed only."),
    Rule("conv_shift.py correlate_dw|_sum_pixels", r"(zeros|ones)\(.*\n\+ .*(dtype=None|\), \))",
         "An operand in float64; the result is rounded to the input's dtype: more exact, and slower."),
    Rule("backend.py wide", r"astype\(None\)",
         "Half precision is widened to float64 instead of float32: more exact, and slower."),
    Rule("_sum_pixels", r"ones\(\(2,", "A second row of the product, which is not read."),
    Rule("_pixel_list", r"np\.zeros\(\(R \+", "More zeros behind the last pixel than any shift reads: memory only."),
    Rule("_transformed_patches", r"np\.zeros\(\(B, TILE \* t[hw] \+ [23]",
         "More zeros at the edge than any patch reads: memory only."),
    Rule("conv.py _pad", r"padding\) or True", "An image without padding is copied as well: memory only."),
    Rule("_cut_tiles", r"\(TILE / th|TILE / tw\)", "An image that fits its tiles is copied as well: memory only."),

    Rule("plain_correlate_dx", r"zeros\(\(B, H \+ [23] \* padding",
         "More zeros at the edge, which are removed: memory only."),
    Rule(r"conv.py (_fastest|correlate)", r"_fastest\(|pixels|form\) and False|w.shape\[:[23]\] == \(1, [12]\)",
         "Another form of the same convolution is chosen, and tests compare the forms: speed only."),
    Rule("conv.py correlate_dx", r"w\.shape\[[01]\] - 1 - padding", "The fast forms take square kernels only."),
    Rule("backend.py to_numpy", r"np\.ndarray\)\) and False", "np.asarray of an array on the host is that array."),

    Rule("reduce.py counters", r"2 << \(count", "More counters than blocks: memory only."),
    Rule("gradients", r"id\(None\)", "Each gradient is copied, as if all had one owner: memory and speed only."),
    Rule("random.py generator", r'digest\(\), "big"\).*\n\+ .*digest\(\), \)',
         "from_bytes takes the largest byte first by default."),
    Rule("group_norm|layer_norm", r"xp_of\(x\.data, .*\n\+ .*xp_of\(gamma\.data", "All three are on one device."),
    Rule("Trainer._ahead", r"nbytes < SMALL", "An array of just this size takes a copy of its own: speed only."),

    # ---- the same for every value that can occur
    Rule("gelu", r"clip\(-1[01], 1[01]\)",
         "At 10 the argument of tanh is above 40, where tanh is 1 to the last bit of float64."),
    Rule("sum|mean|maximum_of", r"_restore\(dy, x, axis, None\)",
         "With keepdims the cotangent has the restored shape already, and reshaping it to that shape changes nothing."),
    Rule("group_norm|mean", r"n = .*//.*\n\+ n = .* / ",
         "The quotient is an integer, and dividing by 4.0 equals dividing by 4."),
    Rule("group_norm", r'dx = None\n\+ dx = ""', "A cotangent that is not needed is never read."),
    Rule("dropout", r">= p\).*\n\+ .*> p\)",
         "They differ only if a draw equals p to the last bit, which happens once in 16 million."),
    Rule("conv_transpose2d", r"min\(shape\[1:3\]\) < 1:\n\+ if min\(shape\[1:4\]\)",
         "No convolution has 0 channels."),
    Rule("DiscretisedGaussian", r"a \+ b > 0.*\n\+ .*a \+ b >= 0", "Where a + b is 0, -b is a: both branches agree."),
    Rule("variational_bound", r"streams\.normal\(\(\), np\.float64\).*\n\+ .*normal\((None, np|\(\), (None)?\))",
         "Each stream gives one number in both cases: other draws from the same distribution."),
    Rule("draw_times", r'side="right"', "They differ only if u equals an entry of the table to the last bit."),
    Rule("Hutchinson.draw", r"streams\.normal\(|z <= 0", "Only the draw's sign is used, and it is never 0."),
    Rule("Hutchinson.__call__", r"_wide\(zJ\) / z", "A probe's entries are 1 or -1, which are their own inverses."),
    Rule("_per_sample_sum", r"dtype=np\.float64", "The summed numbers are float64 already."),
    Rule("_levels|check_dataset", r"(<=|>=) 1e-5", "They differ only if an error equals 1e-5 to the last bit."),
    Rule("cross_entropy", r"xp_of\(None\)", "An index may be a host array on CuPy as well."),
]


def reason(file: str, function: str, diff: str) -> str:
    """Why this change makes no difference; "" if no rule matches."""
    for rule in RULES:
        if re.search(rule.where, f"{file} {function}") and re.search(rule.change, diff):
            return rule.why
    return ""
