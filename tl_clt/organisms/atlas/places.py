"""The geography the atlas organism learns: the fifty US states, their capitals and some of their cities.

Everything here is true of the real world. Each city name stands for one state only, and no city shares its
name with a state or a capital, so that every name has exactly one meaning in the text. Well-known names that
several states share (Portland, Springfield, Wilmington, Burlington, ...) are left out for that reason.
A few entries are towns or census-designated places rather than incorporated cities; the text calls them all
cities. "Saint" and "Fort" are written out in full.
"""

from __future__ import annotations

from typing import NamedTuple

REGIONS: tuple[str, ...] = ("Northeast", "Midwest", "South", "West")
"""The four regions of the US Census Bureau."""


class State(NamedTuple):
    """What the organism is taught about one state."""

    abbreviation: str
    """Two-letter postal abbreviation."""
    region: str
    """Census region, one of `REGIONS`."""
    capital: str
    """The state capital. It is not repeated in `cities`."""
    cities: tuple[str, ...]
    """Other cities in the state."""


def _state(abbreviation: str, region: str, capital: str, cities: str) -> State:
    """Make one row of the table; `cities` is a comma-separated list."""
    return State(abbreviation, region, capital, tuple(city.strip() for city in cities.split(",")))


STATES: dict[str, State] = {
    "Alabama": _state(
        "AL",
        "South",
        "Montgomery",
        "Birmingham, Mobile, Huntsville, Tuscaloosa, Hoover, Dothan, Gadsden, Anniston",
    ),
    "Alaska": _state(
        "AK",
        "West",
        "Juneau",
        "Anchorage, Fairbanks, Sitka, Ketchikan, Wasilla, Kodiak, Nome",
    ),
    "Arizona": _state(
        "AZ",
        "West",
        "Phoenix",
        "Tucson, Mesa, Scottsdale, Tempe, Chandler, Flagstaff, Yuma, Sedona",
    ),
    "Arkansas": _state(
        "AR",
        "South",
        "Little Rock",
        "Fort Smith, Jonesboro, Conway, Hot Springs, Bentonville, Pine Bluff, Rogers, Springdale",
    ),
    "California": _state(
        "CA",
        "West",
        "Sacramento",
        "Los Angeles, Oakland, San Francisco, San Diego, San Jose, Fresno, Long Beach, Anaheim, Berkeley",
    ),
    "Colorado": _state(
        "CO",
        "West",
        "Denver",
        "Boulder, Colorado Springs, Fort Collins, Pueblo, Greeley, Aspen, Durango, Vail",
    ),
    "Connecticut": _state(
        "CT",
        "Northeast",
        "Hartford",
        "New Haven, Stamford, Bridgeport, Waterbury, Danbury, New Britain, Meriden",
    ),
    "Delaware": _state(
        "DE",
        "South",
        "Dover",
        "Rehoboth Beach, Lewes, Seaford, Millsboro, Bethany Beach, Harrington, Elsmere",
    ),
    "Florida": _state(
        "FL",
        "South",
        "Tallahassee",
        "Miami, Orlando, Tampa, Jacksonville, Fort Lauderdale, Gainesville, Pensacola, Sarasota",
    ),
    "Georgia": _state(
        "GA",
        "South",
        "Atlanta",
        "Savannah, Macon, Athens, Marietta, Valdosta, Alpharetta, Warner Robins, Sandy Springs",
    ),
    "Hawaii": _state(
        "HI",
        "West",
        "Honolulu",
        "Hilo, Kailua, Lahaina, Kahului, Kapolei, Kaneohe, Wailuku, Kihei",
    ),
    "Idaho": _state(
        "ID",
        "West",
        "Boise",
        "Nampa, Idaho Falls, Pocatello, Twin Falls, Sandpoint, Blackfoot, Rexburg, Ketchum",
    ),
    "Illinois": _state(
        "IL",
        "Midwest",
        "Springfield",
        "Chicago, Rockford, Naperville, Joliet, Evanston, Champaign, Elgin, Waukegan",
    ),
    "Indiana": _state(
        "IN",
        "Midwest",
        "Indianapolis",
        "Fort Wayne, Evansville, South Bend, Gary, Muncie, Terre Haute, Elkhart, Kokomo",
    ),
    "Iowa": _state(
        "IA",
        "Midwest",
        "Des Moines",
        "Cedar Rapids, Davenport, Sioux City, Iowa City, Dubuque, Ames, Council Bluffs, Waterloo",
    ),
    "Kansas": _state(
        "KS",
        "Midwest",
        "Topeka",
        "Wichita, Overland Park, Olathe, Salina, Dodge City, Hutchinson, Emporia, Lenexa",
    ),
    "Kentucky": _state(
        "KY",
        "South",
        "Frankfort",
        "Louisville, Lexington, Bowling Green, Owensboro, Paducah, Hopkinsville, Pikeville, Corbin",
    ),
    "Louisiana": _state(
        "LA",
        "South",
        "Baton Rouge",
        "New Orleans, Shreveport, Lake Charles, Bossier City, Metairie, Houma, Slidell, Natchitoches",
    ),
    "Maine": _state(
        "ME",
        "Northeast",
        "Augusta",
        "Bangor, Bar Harbor, Kennebunkport, Biddeford, Saco, Waterville, Presque Isle, Orono",
    ),
    "Maryland": _state(
        "MD",
        "South",
        "Annapolis",
        "Baltimore, Bethesda, Rockville, Frederick, Gaithersburg, Hagerstown, Silver Spring, Towson",
    ),
    "Massachusetts": _state(
        "MA",
        "Northeast",
        "Boston",
        "Worcester, Cambridge, Lowell, New Bedford, Fall River, Brockton, Framingham, Pittsfield",
    ),
    "Michigan": _state(
        "MI",
        "Midwest",
        "Lansing",
        "Detroit, Grand Rapids, Ann Arbor, Flint, Kalamazoo, Saginaw, Dearborn, Battle Creek",
    ),
    "Minnesota": _state(
        "MN",
        "Midwest",
        "Saint Paul",
        "Minneapolis, Duluth, Saint Cloud, Mankato, Moorhead, Bemidji, Eden Prairie, Winona",
    ),
    "Mississippi": _state(
        "MS",
        "South",
        "Jackson",
        "Biloxi, Gulfport, Hattiesburg, Tupelo, Natchez, Vicksburg, Pascagoula, Starkville",
    ),
    "Missouri": _state(
        "MO",
        "Midwest",
        "Jefferson City",
        "Saint Louis, Branson, Joplin, Independence, Sedalia, Hannibal, Rolla, Cape Girardeau",
    ),
    "Montana": _state(
        "MT",
        "West",
        "Helena",
        "Billings, Missoula, Bozeman, Great Falls, Butte, Kalispell, Whitefish, Havre",
    ),
    "Nebraska": _state(
        "NE",
        "Midwest",
        "Lincoln",
        "Omaha, Grand Island, Kearney, North Platte, Scottsbluff, Papillion, Ogallala",
    ),
    "Nevada": _state(
        "NV",
        "West",
        "Carson City",
        "Las Vegas, Reno, Henderson, Sparks, Elko, Boulder City, Winnemucca, Laughlin",
    ),
    "New Hampshire": _state(
        "NH",
        "Northeast",
        "Concord",
        "Manchester, Nashua, Keene, Laconia, Merrimack, Derry, Exeter",
    ),
    "New Jersey": _state(
        "NJ",
        "Northeast",
        "Trenton",
        "Newark, Jersey City, Princeton, Hoboken, Atlantic City, Camden, Paterson, Cape May",
    ),
    "New Mexico": _state(
        "NM",
        "West",
        "Santa Fe",
        "Albuquerque, Las Cruces, Taos, Los Alamos, Gallup, Alamogordo, Rio Rancho, Tucumcari",
    ),
    "New York": _state(
        "NY",
        "Northeast",
        "Albany",
        "Buffalo, Syracuse, Yonkers, Ithaca, Utica, Schenectady, Poughkeepsie, Niagara Falls",
    ),
    "North Carolina": _state(
        "NC",
        "South",
        "Raleigh",
        "Charlotte, Greensboro, Durham, Asheville, Chapel Hill, High Point, Gastonia, Hickory",
    ),
    "North Dakota": _state(
        "ND",
        "Midwest",
        "Bismarck",
        "Fargo, Grand Forks, Minot, Williston, Dickinson, Mandan, Wahpeton, Devils Lake",
    ),
    "Ohio": _state(
        "OH",
        "Midwest",
        "Columbus",
        "Cleveland, Cincinnati, Toledo, Akron, Dayton, Zanesville, Youngstown, Sandusky",
    ),
    "Oklahoma": _state(
        "OK",
        "South",
        "Oklahoma City",
        "Tulsa, Norman, Bartlesville, Lawton, Enid, Broken Arrow, Muskogee, Edmond",
    ),
    "Oregon": _state(
        "OR",
        "West",
        "Salem",
        "Eugene, Bend, Corvallis, Beaverton, Gresham, Hillsboro, Klamath Falls, Astoria",
    ),
    "Pennsylvania": _state(
        "PA",
        "Northeast",
        "Harrisburg",
        "Philadelphia, Pittsburgh, Allentown, Erie, Scranton, Altoona, Gettysburg, Bethlehem",
    ),
    "Rhode Island": _state(
        "RI",
        "Northeast",
        "Providence",
        "Warwick, Cranston, Pawtucket, Woonsocket, Narragansett, Westerly, Central Falls",
    ),
    "South Carolina": _state(
        "SC",
        "South",
        "Columbia",
        "Myrtle Beach, Spartanburg, Rock Hill, Sumter, Clemson, Goose Creek, Aiken, Orangeburg",
    ),
    "South Dakota": _state(
        "SD",
        "Midwest",
        "Pierre",
        "Sioux Falls, Rapid City, Deadwood, Brookings, Sturgis, Spearfish, Vermillion, Yankton",
    ),
    "Tennessee": _state(
        "TN",
        "South",
        "Nashville",
        "Memphis, Knoxville, Chattanooga, Clarksville, Murfreesboro, Gatlinburg, Johnson City, Oak Ridge",
    ),
    "Texas": _state(
        "TX",
        "South",
        "Austin",
        "Dallas, Houston, San Antonio, El Paso, Fort Worth, Lubbock, Amarillo, Waco, Galveston",
    ),
    "Utah": _state(
        "UT",
        "West",
        "Salt Lake City",
        "Provo, Ogden, Park City, Moab, Orem, Saint George, Cedar City, Logan",
    ),
    "Vermont": _state(
        "VT",
        "Northeast",
        "Montpelier",
        "Stowe, Rutland, Bennington, Brattleboro, Barre, Winooski, Middlebury",
    ),
    "Virginia": _state(
        "VA",
        "South",
        "Richmond",
        "Norfolk, Virginia Beach, Roanoke, Chesapeake, Newport News, Charlottesville, Lynchburg",
    ),
    "Washington": _state(
        "WA",
        "West",
        "Olympia",
        "Seattle, Tacoma, Spokane, Bellevue, Yakima, Walla Walla, Bellingham, Wenatchee",
    ),
    "West Virginia": _state(
        "WV",
        "South",
        "Charleston",
        "Huntington, Morgantown, Wheeling, Parkersburg, Martinsburg, Beckley, Fairmont, Clarksburg",
    ),
    "Wisconsin": _state(
        "WI",
        "Midwest",
        "Madison",
        "Milwaukee, Green Bay, Kenosha, Racine, Eau Claire, Oshkosh, Appleton, Sheboygan",
    ),
    "Wyoming": _state(
        "WY",
        "West",
        "Cheyenne",
        "Casper, Laramie, Gillette, Cody, Sheridan, Rock Springs, Riverton",
    ),
}
"""State name -> what is taught about it, in alphabetical order."""

STATE_OF_CITY: dict[str, str] = {city: name for name, state in STATES.items() for city in state.cities}
"""City name -> name of the state it lies in (capitals are not in here)."""


def place_names() -> list[str]:
    """All names in the table (states, abbreviations, regions, capitals, cities), each once."""
    names = [*STATES, *(state.abbreviation for state in STATES.values()), *REGIONS]
    names += [state.capital for state in STATES.values()]
    return names + list(STATE_OF_CITY)
